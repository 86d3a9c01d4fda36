# backends: xbd
# A target that cannot be opened fails `xl create`, quickly, with a reason one can read, and leaves nothing.
refused() { # TARGET WORDS_OF_THE_REASON
    if guest wrong "$(disk_target xvda "$1")" </dev/null 2>said; then fail "a guest starts with $1"; fi
    cat said
    grep -q -i -e "$2" said || fail "the reason for $1 does not say '$2'"
    gone wrong || fail "the refused guest stays"
}
truncate -s 16M disk.img
refused imagefile:/scratch/nowhere.img 'nowhere.img.*no such file'
refused nodriver:/scratch/disk.img 'nodriver'
refused 'imagefile:/scratch/disk.img?nooption=1' 'nooption'
[ "$(xenstore-ls -f /local/domain/0/backend/vbd3 2>/dev/null | grep -c -w state)" = 0 ] || fail "a backend stays"
