#!/usr/bin/env bash
# Source this file from the repository root. It creates or reuses a virtual environment, and sets $python to the
# interpreter of that environment.
#
#   PYTHON=python3.12       base interpreter                      (default: the first Python 3.10 to 3.13 that works)
#   VENV=.venv              directory of the environment; VENV=none uses PYTHON itself, which must have all packages
#   EXTRAS=test             extras of pyproject.toml to install, comma-separated
#   CONSTRAINTS=FILE        pinned versions                       (default: constraints/megatron-0.16.txt)
#
# Packages are installed again only if the pins, setup.py, pyproject.toml or the interpreter has changed, or if EXTRAS
# contains extras that are not installed yet.

interpreter_works() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_interpreter() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13 python3.10 python}; do
    if interpreter_works "$candidate"; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return 0
    fi
  done
  echo "PYTHON=${PYTHON:-(unset)}: no Python 3.10 to 3.13 with the venv module; install one (Debian: python3-venv)" >&2
  return 1
}

make_environment() {
  local venv=${VENV:-.venv} constraints=${CONSTRAINTS:-constraints/megatron-0.16.txt} extras=${EXTRAS:-} base made_of stamp
  base=$(find_interpreter) || return 2
  if [[ $venv == none ]]; then
    python=$base
    return 0
  fi
  # If this environment is activated, its own interpreter is found first. Rebuilding would delete that interpreter, so
  # use the interpreter from which the environment was created.
  if [[ ${base%/*} -ef $venv/bin && -s $venv/interpreter ]]; then base=$(<"$venv/interpreter"); fi
  made_of=$({ echo "$base"; "$base" --version; cat "$constraints" setup.py pyproject.toml; } | sha256sum | cut -c -64)
  if [[ $(cat "$venv/interpreter" 2>/dev/null) != "$base" ]]; then
    if [[ -e $venv && ! -f $venv/interpreter ]]; then
      echo "VENV=$venv: exists and was not created by this script; remove it, or set another directory" >&2
      return 2
    fi
    rm -rf "$venv"
    mkdir -p "$venv"
    echo incomplete >"$venv/interpreter"
    "$base" -m venv "$venv" || return 1
    echo "$base" >"$venv/interpreter"
  fi
  python=$venv/bin/python
  for stamp in "$venv"/installed-*"$extras"*; do
    if [[ $(cat "$stamp" 2>/dev/null) == "$made_of" ]]; then return 0; fi
  done
  echo "installing into $venv: $("$base" --version), $constraints ..." >&2
  "$python" -m pip install -qq --disable-pip-version-check -c "$constraints" -e ".${extras:+[$extras]}" || return 1
  echo "$made_of" >"$venv/installed-${extras:-plain}"
}

make_environment
