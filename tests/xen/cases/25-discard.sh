# A guest's discard gives the blocks back to dom0, and what lies around them stays.
image disk.img 64 random
expected=$({ head -c 16M disk.img; head -c 32M /dev/zero; tail -c 16M disk.img; } | md5)
sync disk.img
before=$(stat -c %b disk.img)
guest discards "$(disk xvda /scratch/disk.img)" <<'JOB'
wait_disk xvda
blkdiscard -o $((16 << 20)) -l $((32 << 20)) /dev/xvda
sync
echo "RESULT md5 $(md5sum /dev/xvda | cut -d' ' -f1)"
JOB
wait_guest discards 120
sync disk.img
freed=$(((before - $(stat -c %b disk.img)) / 2048))
[ "$freed" -ge 30 ] || fail "discarding 32 MiB has freed $freed MiB of the image"
equal "the content in the guest" "$(result discards md5)" "$expected"
equal "the content in dom0" "$(md5 disk.img)" "$expected"
