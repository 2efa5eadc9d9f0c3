# Shared by the scripts of this folder; sourced from the root of the checkout.

say() { printf '\n==> %s\n' "$*"; }

# current STAMP FILE...: does STAMP hold the checksums of these files?
current() { stamp=$1; shift; [ -f "$stamp" ] && [ "$(cksum "$@")" = "$(cat "$stamp")" ]; }
mark() { stamp=$1; shift; cksum "$@" >"$stamp"; }

# debian PACKAGE...: install those that are missing; fails where that is not possible.
debian() {
    command -v dpkg-query >/dev/null && command -v apt-get >/dev/null || return 1
    missing=
    for package; do
        dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^.i' ||
            missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    [ "$(id -u)" = 0 ] || command -v sudo >/dev/null || return 1
    say "Debian packages:$missing"
    # shellcheck disable=SC2086  # the names are to be split
    # The package lists are refreshed only if they are absent or too old to serve.
    apt install $missing 2>/dev/null || { apt update && apt install $missing; }
}

apt() {
    command=$1; shift
    set -- env DEBIAN_FRONTEND=noninteractive \
        apt-get "$command" -qq -y --no-install-recommends -o DPkg::Lock::Timeout=300 "$@"
    [ "$(id -u)" = 0 ] || set -- sudo "$@"
    "$@" </dev/null >/dev/null
}
