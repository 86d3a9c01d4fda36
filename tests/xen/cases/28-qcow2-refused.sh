# backends: xbd
# A qcow2 image may not name any file of the host as its base: xl shows why, and nothing is left.
image secret.img 16 random
qemu-img create -q -f qcow2 -b /srv/secret.img -F raw web.qcow2
if guest wrong "$(disk_target xvda qcow2:/srv/web.qcow2)" </dev/null 2>said; then fail "a guest starts"; fi
cat said
grep -q 'script: /srv/web.qcow2: the backing file /srv/secret.img (that is /scratch/secret.img) is not in a directory.*add.*image_dirs' said || fail "the reason does not say what to do"
gone wrong || fail "the refused guest stays"
