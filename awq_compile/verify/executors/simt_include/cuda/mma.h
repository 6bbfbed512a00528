#include "../awq_cuda.h"  // the shim has it all
