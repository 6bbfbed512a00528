# Sourced by scripts/demo and scripts/test: makes .venv in the checkout and installs the project into it.
# Usage: set_up [EXTRA[,EXTRA…]]. Does nothing when it was done before with the same requirements.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\033[1m== %s\033[0m\n' "$*" >&2; }

find_python() {
  for candidate in python3.11 python3.12 python3.13 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or newer found" >&2
  echo "  hint: apt-get install python3 (Debian 12, Ubuntu 24.04 or newer)" >&2
  return 3
}

# Installs Debian packages, with sudo unless root.
apt_install() {
  command -v apt-get >/dev/null || { echo "error: install $* with your system's package manager" >&2; return 3; }
  local as_root=()
  [ "$(id -u)" = 0 ] || as_root=(sudo)
  say "apt-get install $*"
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# Installs those of the Debian packages that are not there. On another system it only names them.
apt_need() {
  if ! command -v dpkg-query >/dev/null; then
    echo "note: not Debian; some tests skip unless your system has what these packages hold: $*" >&2
    return
  fi
  local package absent=()
  for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || absent+=("$package")
  done
  [ ${#absent[@]} = 0 ] || apt_install "${absent[@]}"
}

set_up() {
  local extra="${1:-}" python wanted stamp=".venv/installed"
  python="$(find_python)"
  wanted="$extra $("$python" -c 'import sys; print(sys.version)') $(sha256sum pyproject.toml constraints.txt)"
  if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    apt_install "python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
  fi
  if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    say "making .venv"
    "$python" -m venv --clear .venv
  fi
  say "installing awq-compile and what it needs into .venv (about 1.5 GB the first time)"
  # --retries: a package index that answers slowly must not end a fresh machine's first run.
  .venv/bin/python -m pip install -q --disable-pip-version-check --retries 10 -c constraints.txt -e ".${extra:+[$extra]}"
  printf '%s' "$wanted" >"$stamp"
}
