# limit: 300
# A PVH guest finds its disk and passes verification.
image disk.img 32 random
before=$(md5 disk.img)
guest pvh type=pvh memory=384 "$(disk xvda /scratch/disk.img)" <<'JOB'
wait_disk xvda
echo "RESULT md5 $(md5sum /dev/xvda | cut -d' ' -f1)"
fio --filename=/dev/xvda --direct=1 --ioengine=libaio --iodepth=16 --bsrange=4k-64k --rw=randwrite \
    --size=16M --verify=crc32c --verify_fatal=1 --do_verify=1 --name=pvh
JOB
wait_guest pvh 240
equal "the content" "$(result pvh md5)" "$before"
equal "the number of jobs without an error" "$(console pvh | grep -a -c 'err= 0')" 1
