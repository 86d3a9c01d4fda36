# limit: 300
# An HVM guest (its kernel loaded directly), with the disk from the PV backend alone, finds its disk and passes verification.
image disk.img 32 random
before=$(md5 disk.img)
guest hvm type=hvm memory=384 "$(disk xvda /scratch/disk.img)" <<'JOB'
wait_disk xvda
echo "RESULT md5 $(md5sum /dev/xvda | cut -d' ' -f1)"
fio --filename=/dev/xvda --direct=1 --ioengine=libaio --iodepth=16 --bsrange=4k-64k --rw=randwrite \
    --size=16M --verify=crc32c --verify_fatal=1 --do_verify=1 --name=hvm
JOB
wait_guest hvm 240
equal "the content" "$(result hvm md5)" "$before"
equal "the number of jobs without an error" "$(console hvm | grep -a -c 'err= 0')" 1
