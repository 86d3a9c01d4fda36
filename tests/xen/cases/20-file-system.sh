# limit: 300
# A guest makes a file system, writes, unmounts and checks it; dom0 finds it clean and the file the same.
image disk.img 128
guest files "$(disk xvda /scratch/disk.img)" <<'JOB'
wait_disk xvda
mkfs.ext4 -q /dev/xvda
mount -t ext4 /dev/xvda /mnt
dd if=/dev/urandom of=/mnt/file bs=64k count=128
mkdir /mnt/directory
n=0; while [ $n -lt 50 ]; do echo $n >/mnt/directory/$n; n=$((n + 1)); done
sync
echo "RESULT md5 $(md5sum /mnt/file | cut -d' ' -f1)"
umount /mnt
e2fsck -f -n /dev/xvda
JOB
wait_guest files 120
e2fsck -f -n disk.img
mount -o loop,ro disk.img /mnt
in_dom0=$(md5 /mnt/file)
files=$(find /mnt/directory -type f | wc -l)
umount /mnt
equal "the file in dom0" "$in_dom0" "$(result files md5)"
equal "the number of small files" "$files" 50
