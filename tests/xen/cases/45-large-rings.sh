# backends: xbd blkback
# limit: 300
# Rings of several pages and a queue for each virtual CPU; then a frontend with one page and one queue.
image disk.img 64
run() { # NAME BLKFRONT_PARAMETERS
    guest "$1" vcpus=2 blkfront="$2" "$(disk xvda /scratch/disk.img)" <<'JOB'
wait_disk xvda
echo "RESULT queues $(ls /sys/block/xvda/mq | wc -l)"
fio --direct=1 --ioengine=libaio --iodepth=64 --bsrange=4k-128k --rw=randwrite --numjobs=2 --size=16M \
    --offset_increment=32M --verify=crc32c --verify_fatal=1 --do_verify=1 --name=queue --filename=/dev/xvda
JOB
    wait_line "$1" '^RESULT queues' 120
    frontend=/local/domain/$(xl domid "$1")/device/vbd/51712
    xenstore-ls "$frontend"
    order=$(xenstore-read "$frontend/ring-page-order" || echo 0)
    wait_guest "$1" 120
    equal "the number of $1's jobs without an error" "$(console "$1" | grep -a -c 'err= 0')" 2
}
run large max_ring_page_order=4,max_queues=2
equal "the order of the ring's pages" "$order" 4
equal "the number of queues" "$(result large queues)" 2
run small max_ring_page_order=0,max_queues=1
equal "the order of the ring's pages" "$order" 0
equal "the number of queues" "$(result small queues)" 1
