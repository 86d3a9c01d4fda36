# limit: 300
# fio writes blocks of all sizes at random, deep queues, some with a flush behind, and reads them back.
image disk.img 64
guest fio vcpus=2 "$(disk xvda /scratch/disk.img)" <<'JOB'
wait_disk xvda
verify="fio --filename=/dev/xvda --direct=1 --ioengine=libaio --verify=crc32c --verify_fatal=1 --do_verify=1"
$verify --name=small --rw=randwrite --bs=4k --iodepth=32 --size=8M --fsync=64
$verify --name=mixed --rw=randwrite --bsrange=4k-256k --bs_unaligned=0 --iodepth=16 --size=48M
$verify --name=large --rw=write --bs=1M --iodepth=4 --size=32M
$verify --name=sectors --rw=randwrite --bs=512 --iodepth=8 --offset=48M --size=512k
JOB
wait_guest fio 240
equal "the number of jobs without an error" "$(console fio | grep -a -c 'err= 0')" 4
