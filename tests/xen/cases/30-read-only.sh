# A read-only disk is shown as one, can be read, and not written, whatever the guest tries.
image disk.img 16 random
before=$(md5 disk.img)
guest reads "$(disk xvda /scratch/disk.img ro)" <<'JOB'
wait_disk xvda
echo "RESULT read-only $(cat /sys/block/xvda/ro)"
echo "RESULT md5 $(md5sum /dev/xvda | cut -d' ' -f1)"
blockdev --setrw /dev/xvda || true
if dd if=/dev/zero of=/dev/xvda bs=4k count=16 oflag=direct; then echo "RESULT write accepted"; fi
if blkdiscard /dev/xvda; then echo "RESULT discard accepted"; fi
JOB
wait_guest reads 120
equal "the guest's ro flag" "$(result reads read-only)" 1
equal "the content in the guest" "$(result reads md5)" "$before"
equal "a write" "$(result reads write)" ""
equal "a discard" "$(result reads discard)" ""
equal "the image" "$(md5 disk.img)" "$before"
