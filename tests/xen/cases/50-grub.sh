# limit: 300
# GRUB's image for PV guests has a frontend of its own: it reads its configuration, a kernel and an
# initramfs from the disk, closes its connection and hands over to Linux, which connects anew.
mkdir -p tree/boot/grub
cp /lab/bookworm-vmlinuz tree/boot/vmlinuz
initramfs bookworm- >tree/boot/initramfs <<'JOB'
wait_disk xvda
uname -r
mount -t ext4 /dev/xvda /mnt
echo "RESULT configuration $(md5sum /mnt/boot/grub/grub.cfg | cut -d' ' -f1)"
echo written by Linux >/mnt/note
umount /mnt
JOB
cat >tree/boot/grub/grub.cfg <<'GRUB'
set root=(xen/xvda)
linux /boot/vmlinuz console=hvc0 quiet mitigations=off rdinit=/init panic=1
initrd /boot/initramfs
boot
GRUB
configuration=$(md5 tree/boot/grub/grub.cfg)
truncate -s 96M disk.img
mke2fs -q -t ext4 -O ^has_journal -d tree disk.img
GUEST_KERNEL=/usr/lib/grub-xen/grub-x86_64-xen.bin
guest grub memory=384 "$(disk xvda /scratch/disk.img)" </dev/null
wait_guest grub 240
equal "the configuration as Linux reads it" "$(result grub configuration)" "$configuration"
mount -o loop,ro disk.img /mnt
note=$(cat /mnt/note)
umount /mnt
equal "the file in dom0" "$note" "written by Linux"
