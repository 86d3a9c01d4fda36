# A PV guest finds its disk: the size and every byte of it.
image disk.img 32 random
guest finds "$(disk xvda /scratch/disk.img)" <<'JOB'
wait_disk xvda
echo "RESULT sectors $(cat /sys/block/xvda/size)"
echo "RESULT md5 $(md5sum /dev/xvda | cut -d' ' -f1)"
JOB
wait_guest finds 120
equal "the size in sectors" "$(result finds sectors)" 65536
equal "the content" "$(result finds md5)" "$(md5 disk.img)"
