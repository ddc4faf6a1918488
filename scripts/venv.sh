# Sourced by the other scripts: makes .venv on first use, and again when the pins or this file change.
# Sets ROOT (the checkout) and PY (the environment's python).

ROOT=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
PY="$ROOT/.venv/bin/python"

_say() { printf '%s\n' "$*" >&2; }

# A CPython that torch_xla has wheels for; RUNNER_PYTHON names one.
_find_python() {
    local candidate
    for candidate in ${RUNNER_PYTHON:+"$RUNNER_PYTHON"} python3 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
            printf '%s' "$candidate"
            return
        fi
        if [ "$candidate" = "${RUNNER_PYTHON:-}" ]; then
            _say "RUNNER_PYTHON must be a CPython 3.10 to 3.13; got $candidate"
            return 1
        fi
    done
    _say "CPython 3.10 to 3.13 is needed (torch_xla 2.9.0 has no wheel for others); none was found. Set RUNNER_PYTHON."
    return 1
}

# uv from the PATH, or one fetched with pip into a folder of its own inside the environment.
_find_uv() {
    local python=$1
    if command -v uv >/dev/null 2>&1; then
        command -v uv
        return
    fi
    local home="$ROOT/.venv.uv"
    if ! "$python" -m pip install --quiet --disable-pip-version-check --target "$home" "$(grep '^uv==' "$ROOT/scripts/constraints.txt")" >&2; then
        _say "pip could not fetch uv; install uv or pip for $python and try again"
        return 1
    fi
    printf '%s' "$home/bin/uv"
}

_stamp() {
    cat "$ROOT/pyproject.toml" "$ROOT/scripts/constraints.txt" "$ROOT/scripts/venv.sh"
    printf '%s\n' "${RUNNER_PYTHON:-}"
}

_make_venv() {
    local python uv
    _say "Setting up $ROOT/.venv (once; about 8 GB, a minute or two) ..."
    rm -f "$ROOT/.venv/.stamp"
    python=$(_find_python) || return 1
    uv=$(_find_uv "$python") || return 1
    [ -x "$PY" ] && [ -z "${RUNNER_PYTHON:-}" ] ||
        "$uv" venv --quiet --clear --no-project --python "$(command -v "$python")" "$ROOT/.venv" || return 1
    # Where PYTHONDONTWRITEBYTECODE is set, every start of a worker would compile torch's sources anew.
    "$uv" pip install --quiet --compile-bytecode --python "$PY" --constraints "$ROOT/scripts/constraints.txt" \
        --editable "$ROOT[dev]" || return 1
    rm -rf "$ROOT/.venv.uv"
    _stamp >"$ROOT/.venv/.stamp.new" && mv "$ROOT/.venv/.stamp.new" "$ROOT/.venv/.stamp"
    _say "Ready."
}

_current() { [ -x "$PY" ] && _stamp | cmp -s - "$ROOT/.venv/.stamp"; }

if ! _current; then
    if command -v flock >/dev/null 2>&1; then
        exec 9>"$ROOT/.venv.lock"
        flock 9
    fi
    if ! _current && ! _make_venv; then
        _say "The environment could not be made; nothing was run."
        exit 1
    fi
    exec 9>&-
fi
