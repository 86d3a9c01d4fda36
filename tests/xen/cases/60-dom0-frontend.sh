# dom0 attaches a disk to itself: its own frontend mounts an image.
image disk.img 64
modprobe xen-blkfront
xl block-attach 0 "$(disk xvdx /scratch/disk.img)"
within 20 [ -b /dev/xvdx ] || fail "dom0 does not find /dev/xvdx"
mke2fs -q -t ext4 /dev/xvdx
mount /dev/xvdx /mnt
dd if=/dev/urandom of=/mnt/file bs=64k count=128 status=none
written=$(md5 /mnt/file)
umount /mnt
e2fsck -f -n /dev/xvdx
xl block-detach 0 xvdx
within 10 [ ! -b /dev/xvdx ] || fail "/dev/xvdx stays"
e2fsck -f -n disk.img
mount -o loop,ro disk.img /mnt
read_back=$(md5 /mnt/file)
umount /mnt
equal "the file in the image" "$read_back" "$written"
