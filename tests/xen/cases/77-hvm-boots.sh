# limit: 900
# suites: trixie
# backends: xbd qdisk
# An HVM guest boots from its disk as from a PC's: BIOS, GRUB in the first sectors, a kernel and an initramfs
# on an ext4 partition, all of that through the disk that QEMU emulates. Then Linux finds xvda by its own driver.
mkdir -p tree/boot/grub
cp /lab/bookworm-vmlinuz tree/boot/vmlinuz
initramfs bookworm- >tree/boot/initramfs <<'JOB'
wait_disk xvda
echo "RESULT emulated $(ls /sys/block | grep -c -e '^sd' -e '^hd' || true)"
echo "RESULT md5 $(md5sum /dev/xvda | cut -d' ' -f1)"
mount -t ext4 /dev/xvda1 /mnt
echo written by Linux >/mnt/note
umount /mnt
JOB
cat >tree/boot/grub/grub.cfg <<'GRUB'
set root=(hd0,msdos1)
linux /boot/vmlinuz console=hvc0 initcall_debug mitigations=off rdinit=/init panic=1
initrd /boot/initramfs
boot
GRUB
truncate -s 64M disk.img
mke2fs -q -t ext4 -O ^has_journal -E offset=$((1 << 20)) -d tree disk.img 63M
dd if=/lab/boot.img of=disk.img bs=440 count=1 conv=notrunc status=none
# One partition of Linux's kind, active, from sector 2048 on, of 63 MiB; then the signature.
printf '\200\0\0\0\203\0\0\0\0\010\0\0\0\370\001\0' | dd of=disk.img bs=1 seek=446 conv=notrunc status=none
printf '\125\252' | dd of=disk.img bs=1 seek=510 conv=notrunc status=none
dd if=/lab/core.img of=disk.img bs=512 seek=1 conv=notrunc status=none
before=$(md5 disk.img)
guest boots type=hvm kernel=disk memory=384 "$(disk xvda /scratch/disk.img)" </dev/null
if [ "$BACKEND" = xbd ]; then
    socket=/run/xbd/nbd/xbdback$(xl domid boots)i51712
    equal "what libxl finds" "$(xenstore-read "$(backend boots)/physical-device-path")" "$socket"
    pgrep -f "socket=$socket," || fail "no device model has the disk"
fi
wait_guest boots 840
console boots >/host/out/console.txt
equal "the number of emulated disks that Linux sees" "$(result boots emulated)" 0
equal "the content as Linux reads it" "$(result boots md5)" "$before"
mount -o loop,ro,offset=$((1 << 20)) disk.img /mnt
note=$(cat /mnt/note)
umount /mnt
equal "the file in dom0" "$note" "written by Linux"
