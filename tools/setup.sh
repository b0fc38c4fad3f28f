#!/usr/bin/env bash
# Make or refresh the environment in .venv:   tools/setup.sh run     what `make run` needs: torch and the package
#                                             tools/setup.sh dev     also what `make test` needs: the dev extras, the
#                                                                    packages to compare with, npm, a browser
# A machine without an NVIDIA GPU gets the CPU build of torch, so that nobody downloads CUDA for nothing.
# PYTHON=/path/to/python3.12 chooses the interpreter. TORCH=2.4.1 asks for that release (or the newest, TORCH=newest), and
# VENV=.venv-torch-2.4.1 for another folder: `make test-torch TORCH=2.4.1` does both.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-run}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
say()  { echo "setup: $*"; }
stop() { echo "setup: $*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }
can_apt() { [ "$(id -u)" = 0 ] && have apt-get; }
apt() { DEBIAN_FRONTEND=noninteractive apt-get -qq "$@" >/dev/null; }
case $what in run|dev) ;; *) stop "unknown part '$what': say run or dev" ;; esac

# ---- the interpreter and its environment
venv=${VENV:-.venv}
py=$venv/bin/python
if ! "$py" -c 'import pip, sys; assert sys.version_info >= (3, 10)' 2>/dev/null; then
  base=${PYTHON:-python3}
  have "$base" || stop "no '$base' found: install Python 3.10 or newer, or name one with PYTHON=..."
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    stop "$("$base" --version 2>&1) is too old: Python 3.10 or newer is needed; name one with PYTHON=/path/to/python3"
  say "making $venv with $("$base" --version)"
  "$base" -m venv --clear "$venv" || stop "'$base -m venv' failed: on Debian or Ubuntu, apt-get install python3-venv and try again"
fi
pip() { "$py" -m pip "$@"; }

# ---- torch, first and alone, so that the right build is there before anything asks for it
gpu() { [ "$(uname)" = Darwin ] || { have nvidia-smi && nvidia-smi -L >/dev/null 2>&1; }; }
want=torch                                         # what else may be asked of pip
case ${TORCH:-} in '') want='torch>=2.4' ;; newest) ;; *) want="torch==$TORCH" ;; esac
torch_cpu() {
  local cpu=${TORCH:-2.13.0}
  if [ "$cpu" != newest ]; then pip install -qq "torch==$cpu+cpu" 2>/dev/null && return; fi
  say "pip is offered no CPU build of torch; asking uv for one"
  pip install -qq uv && "$py" -m uv pip install -qq --python "$py" --torch-backend=cpu "$want" && return
  say "WARNING: no CPU build of torch could be had; the default build comes instead, with several GB of CUDA libraries"
  pip install -qq "$want"
}
torch_version() { "$py" -c 'import torch, importlib.metadata as m; print(m.version("torch"), torch.__version__)' 2>/dev/null; }
if ! torch_version >/dev/null; then
  if gpu; then say "installing torch"; pip install -qq "$want"
  else say "no NVIDIA GPU here: installing the CPU build of torch"; torch_cpu; fi
fi
torch=$(torch_version) || stop "torch was installed, but cannot be imported: remove $venv and try again"
echo "torch==${torch% *}" >"$venv/torch.txt"            # nothing that comes later may bring another build
together() { pip install -qq -c "$venv/torch.txt" "$@"; }
ready() {
  [ "$(torch_version)" = "$torch" ] || stop "torch ${torch#* } was replaced by '$(torch_version)': remove $venv and try again"
  touch "$@"
}

# ---- the package, and for `dev` its development tools
if [ "$what" = run ]; then
  say "installing hessian_overlap"; together -e .
  ready "$venv/.run-ready"; exit
fi
say "installing hessian_overlap with its development tools"; together -e '.[dev]'
say "installing the packages to compare with"; together --no-deps -r tests/peers.txt

browser() { "$py" tools/browser.py; }
if ! browser >/dev/null; then
  if can_apt; then say "installing chromium (apt-get)"; { apt update && apt install -y --no-install-recommends chromium; } || true; fi
  browser >/dev/null || { say "installing chromium (playwright)"; "$py" -m playwright install chromium >/dev/null 2>&1 || true; }
fi
browser >/dev/null || say "WARNING: no Chromium could be had: the tests that need a browser will be skipped (under CI=true: fail)"
if ! have npm && ! have quarto; then
  if can_apt; then say "installing npm (apt-get)"; { apt update && apt install -y --no-install-recommends npm; } || true; fi
  have npm || say "WARNING: neither npm nor quarto is here: the site cannot be built and its tests will be skipped (under CI=true: fail)"
fi
ready "$venv/.run-ready" "$venv/.dev-ready"
