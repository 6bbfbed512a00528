// `TVMFFIHandleInitOnce` as TVM-FFI's c_api.h describes it, for an app whose runtime is built without the file that
// defines it. Weak: a runtime that has its own keeps it.

extern void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int num_parts);

// Whether the lock was taken before; takes it. On 64-bit ARM the compiler would call a support function for the builtin.
static int taken(char* lock) {
#ifdef __aarch64__
  return __builtin_arm_ldaex(lock) || __builtin_arm_stlex(1, lock);
#else
  return __atomic_test_and_set(lock, __ATOMIC_ACQUIRE);
#endif
}

__attribute__((weak)) int TVMFFIHandleInitOnce(void** handle, int (*init)(void** result)) {
  static char busy;
  if (__atomic_load_n(handle, __ATOMIC_ACQUIRE)) return 0;
  while (taken(&busy)) {
  }
  int code = 0;
  if (!*handle) {  // another thread may have been first
    void* result = 0;
    code = init(&result);
    if (code == 0 && !result) {
      const char* message = "the function that makes a handle made none";
      TVMFFIErrorSetRaisedFromCStrParts("RuntimeError", &message, 1);
      code = -1;
    }
    if (code == 0) __atomic_store_n(handle, result, __ATOMIC_RELEASE);
  }
  __atomic_store_n(&busy, 0, __ATOMIC_RELEASE);
  return code;
}
