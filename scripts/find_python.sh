# Print the name of a Python >= 3.11: $PYTHON where it is set, else the first that fits. A sentence and 1 if none does.
fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

if [ -n "${PYTHON:-}" ]; then
  if fits "$PYTHON"; then echo "$PYTHON"; exit 0; fi
  echo "PYTHON must name a Python >= 3.11; '$PYTHON' is none. Leave it out to let make look for one." >&2
  exit 1
fi
for name in python3 python3.13 python3.12 python3.11 python; do
  if fits "$name"; then echo "$name"; exit 0; fi
done
echo "No Python >= 3.11 found (tried python3, python3.13, python3.12, python3.11, python);" \
  "install one, or name it: make test PYTHON=/path/to/python" >&2
exit 1
