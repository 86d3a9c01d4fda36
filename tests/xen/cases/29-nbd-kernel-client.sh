# backends: xbd
# limit: 300
# dom0's kernel makes a block device of an exported qcow2 disk, with a file system that it trims; QEMU reads the same.
xbd image create qcow2:/scratch/disk.qcow2 128M
python3 -P -c 'from xbd.cli import main; main()' export qcow2:/scratch/disk.qcow2 --nbd /tmp/lab/export.sock &
server=$!
within 60 [ -S /tmp/lab/export.sock ] || fail "nothing is exported"
modprobe nbd
nbd-client -unix /tmp/lab/export.sock /dev/nbd0 -b 512
equal "the size" "$(blockdev --getsize64 /dev/nbd0)" $((128 << 20))
mke2fs -q -t ext4 /dev/nbd0
mount /dev/nbd0 /mnt
dd if=/dev/urandom of=/mnt/file bs=64k count=128 status=none
dd if=/dev/urandom of=/mnt/other bs=64k count=320 status=none
sync
written=$(md5 /mnt/file)
filled=$(stat -c %b disk.qcow2)
rm /mnt/other
sync                                                # what is freed can be trimmed once the journal has it
fstrim /mnt
umount /mnt
freed=$(((filled - $(stat -c %b disk.qcow2)) / 2048))
[ "$freed" -ge 16 ] || fail "trimming 20 MiB has freed $freed MiB of the image"
whole=$(md5 /dev/nbd0)
nbd-client -d /dev/nbd0
kill "$server"
wait "$server" || fail "the export ends with $?"
qemu-img check disk.qcow2
qemu-img convert -O raw disk.qcow2 now.img
equal "the content as qemu-img reads it" "$(md5 now.img)" "$whole"
e2fsck -f -n now.img
mount -o loop,ro now.img /mnt
read_back=$(md5 /mnt/file)
umount /mnt
equal "the file" "$read_back" "$written"
