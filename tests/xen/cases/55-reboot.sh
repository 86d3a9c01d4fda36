# limit: 300
# A guest that reboots finds its disk again, and on it what it wrote before.
image disk.img 16
guest reboots "$(disk xvda /scratch/disk.img)" <<'JOB'
wait_disk xvda
boots=$(($(head -c 1 /dev/xvda | tr -d '\0') + 1))
echo "RESULT boot $boots"
{ printf %s $boots; head -c 4095 /dev/zero; } | dd of=/dev/xvda bs=4k count=1 iflag=fullblock oflag=direct
sync
[ $boots -ge 3 ] || reboot -f
JOB
wait_line reboots '^RESULT boot 3$' 120
wait_guest reboots 120
equal "the number of boots on the disk" "$(head -c 1 disk.img)" 3
