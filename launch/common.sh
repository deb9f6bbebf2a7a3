# Shared by the launch scripts; sourced, not run.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -d "$here/../.venv/bin" ]; then
    PATH="$(cd "$here/../.venv/bin" && pwd):$PATH"
fi

fail() {
    echo "error: $*" >&2
    exit 2
}

# Print the comment at the head of a script.
show_help() {
    sed -n '2,/^[^#]/{/^#/!d; s/^# \{0,1\}//; p}' "$1"
}

# Read the options before CONFIG into variables. Each word of $1 is NAME=number or NAME=value and sets $NAME, dashes turned
# into underscores; --dry-run and --help are understood by all scripts. The rest goes to the array `config`.
parse_options() {
    local known=" $1 " name
    shift
    while [[ "${1:-}" = -* ]]; do
        name=${1#--}
        case $1 in
            --dry-run) dry_run=1; shift; continue ;;
            -h | --help) show_help "$0"; exit ;;
        esac
        [[ "$known" = *" $name="* ]] || fail "unknown option $1; see --help"
        [ $# -ge 2 ] || fail "$1 needs a value; see --help"
        if [[ "$known" = *" $name=number "* && ! "$2" =~ ^[1-9][0-9]*$ ]]; then
            fail "$1 needs a whole number of at least 1, not '$2'"
        fi
        printf -v "${name//-/_}" %s "$2"
        shift 2
    done
    [ $# -ge 1 ] || fail "give a config: bash launch/${0##*/} [OPTION ...] CONFIG [section.key=value ...]; see --help"
    config=("$@")
}

# GPUs of this machine, or 1.
default_processes() {
    local count=0
    if command -v nvidia-smi >/dev/null; then count=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true); fi
    echo $((count > 0 ? count : 1))
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

# Run the command, or with dry_run=1 print it.
launch() {
    if [ "${dry_run:-0}" = 1 ]; then
        printf '%q ' "$@"
        echo
        return
    fi
    command -v "$1" >/dev/null || fail "$1 was not found; install longctx first (bash tools/setup_env.sh)"
    exec "$@"
}
