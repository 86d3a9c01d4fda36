# limit: 300
# Two guests with two disks each, all four under verified load at once.
for name in one two; do
    image $name-a.img 32
    image $name-b.img 32
    guest $name "$(disk xvda /scratch/$name-a.img)" "$(disk xvdb /scratch/$name-b.img)" <<'JOB'
wait_disk xvda
wait_disk xvdb
fio --direct=1 --ioengine=libaio --iodepth=8 --bsrange=4k-64k --rw=randwrite --size=16M --verify=crc32c \
    --verify_fatal=1 --do_verify=1 --name=a --filename=/dev/xvda --name=b --filename=/dev/xvdb
echo "RESULT a $(md5sum /dev/xvda | cut -d' ' -f1)"
echo "RESULT b $(md5sum /dev/xvdb | cut -d' ' -f1)"
JOB
done
for name in one two; do
    wait_guest $name 240
    equal "the number of $name's jobs without an error" "$(console $name | grep -a -c 'err= 0')" 2
    equal "disk a of $name" "$(result $name a)" "$(md5 $name-a.img)"
    equal "disk b of $name" "$(result $name b)" "$(md5 $name-b.img)"
done
