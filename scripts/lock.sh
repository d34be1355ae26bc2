# Write constraints.txt anew: the newest versions that fit pyproject.toml, resolved in a virtual environment of its own.
# The comment at the head of the file and its version of torch are kept; to move torch, edit its line first.
set -eu
python=${PYTHON:-python3}
file=constraints.txt
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PIP_CONSTRAINT PIP_BUILD_CONSTRAINT
grep '^torch==' "$file" >"$folder/torch.txt"
"$python" -m venv "$folder/venv"
pip="$folder/venv/bin/python -m pip"
$pip install --quiet --constraint "$folder/torch.txt" torch
# setuptools and wheel are what builds the package.
$pip install --quiet --upgrade --constraint "$folder/torch.txt" setuptools wheel --editable ".[dev]"

# Left out: this package, pip (each environment brings its own), and what torch pins for itself where it is a CUDA
# build (nvidia, cuda, triton). A local label such as +cpu is cut off: 2.13.0 also accepts 2.13.0+cpu, not the reverse.
$pip freeze --all | grep -v -i -E '^(kronsae|pip|triton|nvidia|cuda)[^=]*(==| @)' |
  sed -e 's/+[a-z0-9.]*$//' | grep -E '^[A-Za-z0-9._-]+==[^ ]+$' | LC_ALL=C sort -f >"$folder/pins.txt"
{ sed -n '/^#/!q;p' "$file"; cat "$folder/pins.txt"; } >"$folder/new.txt"
cp "$folder/new.txt" "$file"
echo "$file: $(grep -c == "$file") packages."
