# backends: xbd
# limit: 600
# A disk in a qcow2 image over a base that it shares: a guest makes a file system on it, and frees what it
# trims; a snapshot is taken while fio writes. What the guest reads is what qemu-img reads, the base stays as
# it was, and the snapshot has the moment it was taken. The commands are those of docs/xl.md.
mkdir images
image base.img 96 random
qemu-img convert -f raw -O qcow2 base.img images/debian.qcow2
base=$(md5 images/debian.qcow2)
content=$(md5 base.img)
rm base.img
xbd image create qcow2:/srv/web.qcow2 -b qcow2:/srv/images/debian.qcow2
image signal.img 1
guest files vcpus=2 "$(disk_target xvda qcow2:/srv/web.qcow2)" <<'JOB'
wait_disk xvda
echo "RESULT base $(md5sum /dev/xvda | cut -d' ' -f1)"
mkfs.ext4 -q /dev/xvda
mount -t ext4 /dev/xvda /mnt
dd if=/dev/urandom of=/mnt/file bs=64k count=512
sync
echo "RESULT step filled"
wait_disk xvdb
rm /mnt/file
sync
fstrim /mnt
echo kept >/mnt/note
sync
echo "RESULT step trimmed"
dd if=/dev/urandom of=/mnt/marker bs=64k count=64
echo "RESULT marker $(md5sum /mnt/marker | cut -d' ' -f1)"
sync
echo "RESULT step marked"
while [ -b /dev/xvdb ]; do
    fio --directory=/mnt --direct=1 --ioengine=libaio --iodepth=8 --bsrange=4k-64k --rw=randwrite --size=16M \
        --fsync=64 --verify=crc32c --verify_fatal=1 --do_verify=1 --name=load
done
rm /mnt/marker
umount /mnt
e2fsck -f -n /dev/xvda
echo "RESULT md5 $(md5sum /dev/xvda | cut -d' ' -f1)"
JOB
space() { sync web.qcow2; stat -c %b web.qcow2; }
wait_line files '^RESULT step filled' 180
filled=$(space)
xl block-attach files "$(disk xvdb /scratch/signal.img)"
wait_line files '^RESULT step trimmed' 180
freed=$(((filled - $(space)) / 2048))
wait_line files '^RESULT step marked' 180
name=xbdback$(xl domid files)i51712
within 120 says files 'load: (g=0)' || fail "fio does not start"
xbd snapshot "$name" before-upgrade
xl block-detach files xvdb
wait_guest files 300
equal "the base as the guest reads it" "$(result files base)" "$content"
# What is written next, 4 MiB, may be there already, and some clusters more are reserved.
[ "$freed" -ge 22 ] || fail "trimming 32 MiB has freed $freed MiB of the image"
[ "$(console files | grep -a -c 'err= 0')" -ge 1 ] || fail "no job without an error"
if console files | grep -a -q 'err=[^ ]* *[1-9]'; then fail "a job with an error"; fi
qemu-img check web.qcow2
xbd image check qcow2:/srv/web.qcow2
qemu-img convert -O raw web.qcow2 now.img
equal "the content as qemu-img reads it" "$(md5 now.img)" "$(result files md5)"
qemu-img convert -O raw -l snapshot.name=before-upgrade web.qcow2 then.img
mount -o loop then.img /mnt     # which mends it by its journal
marker=$(md5 /mnt/marker)
note=$(cat /mnt/note)
umount /mnt
e2fsck -f -n then.img
equal "the file in the snapshot" "$marker" "$(result files marker)"
equal "the other one" "$note" kept
equal "the base" "$(md5 images/debian.qcow2)" "$base"
