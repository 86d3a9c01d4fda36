# shellcheck shell=sh disable=SC1091
# What the cases and main have in common. Sourced in dom0, by dash.
export PYTHONPATH=/payload/python PYTHONDONTWRITEBYTECODE=1
. /host/settings    # BACKEND, SUITE, DATAPATH

CONSOLES=/var/log/xen/console

fail() { echo "FAIL: $*"; exit 1; }

# equal WHAT GOT EXPECTED
equal() { [ "$2" = "$3" ] || fail "$1 is '$2', not '$3'"; }

uptime_seconds() { cut -d. -f1 /proc/uptime; }

# within SECONDS COMMAND...: until the command succeeds
within() (
    set +x
    deadline=$(($(uptime_seconds) + $1)); shift
    until "$@"; do
        [ "$(uptime_seconds)" -lt "$deadline" ] || exit 1
        sleep 0.3
    done
)

md5() { md5sum "$@" | cut -d' ' -f1; }

# --- images and disk lines

# image NAME MIB [random]: a new image /scratch/NAME
image() {
    rm -f "/scratch/$1"
    truncate -s "$2M" "/scratch/$1"
    [ "${3:-}" != random ] || dd if=/dev/urandom of="/scratch/$1" bs=1M count="$2" conv=notrunc status=none
}

# disk VDEV FILE [rw|ro] [OPTION=VALUE&...]: xl's line for a disk, with the backend under test
disk() {
    case $BACKEND in
        xbd) target="imagefile:$2${4:+?$4}" ;;
        *) target=$2 ;;
    esac
    disk_target "$1" "$target" "${3:-rw}"
}

# disk_target VDEV TARGET [rw|ro]: the same for any target of the backend
disk_target() {
    case $BACKEND-$SUITE in
        xbd-bookworm) how=script=block-xbd ;;
        xbd-*) how=backendtype=tap,script=block-xbd ;;
        blkback-*) how=script=block-lab ;;
        qdisk-*) how=backendtype=qdisk ;;
    esac
    echo "format=raw,vdev=$1,access=${3:-rw},$how,target=$2"
}

# --- guests

# guest NAME [SETTING=VALUE...] [DISK...] <JOB: starts a guest that runs the shell script JOB and goes.
# Settings: type (pv, pvh, hvm), vcpus, memory, blkfront (its module's parameters), kernel (bookworm, or
# disk: firmware and boot loader find it there, and the job too)
guest() {
    name=$1; shift
    type=pv vcpus=1 memory=320 blkfront='' kernel=''
    while :; do
        case ${1:-} in
            type=*) type=${1#*=} ;;
            vcpus=*) vcpus=${1#*=} ;;
            memory=*) memory=${1#*=} ;;
            blkfront=*) blkfront=${1#*=} ;;
            kernel=disk) kernel=disk ;;
            kernel=*) kernel=${1#*=}- ;;
            *) break ;;
        esac
        shift
    done
    [ "$kernel" = disk ] || initramfs "$kernel" >"/tmp/lab/$name.initramfs"     # has the job, from standard input
    rm -f "$CONSOLES/guest-$name.log"
    {
        printf 'name = "%s"\ntype = "%s"\nvcpus = %s\nmemory = %s\n' "$name" "$type" "$vcpus" "$memory"
        if [ "$kernel" != disk ]; then
            printf 'kernel = "%s"\nramdisk = "%s"\n' "${GUEST_KERNEL:-/lab/${kernel}vmlinuz}" "/tmp/lab/$name.initramfs"
            printf 'extra = "console=hvc0 quiet mitigations=off rdinit=/init panic=1 blkfront=%s"\n' "$blkfront"
        fi
        printf 'on_poweroff = "destroy"\non_reboot = "restart"\non_crash = "destroy"\n'
        [ "$type" = pv ] || printf 'tsc_mode = "native"\n'
        # From an IDE disk the firmware reads single sectors: emulated, that would take hours.
        [ "$kernel" != disk ] || printf 'hdtype = "ahci"\n'
        [ "$type" != hvm ] || printf 'vga = "none"\nserial = "none"\nusb = 0\n'
        printf 'disk = ['
        [ $# = 0 ] || printf ' "%s",' "$@"
        printf ' ]\n'
    } >"/tmp/lab/$name.cfg"
    xl create "/tmp/lab/$name.cfg"
}

# initramfs [bookworm-] <JOB: the guests' initramfs with the job in it
initramfs() {
    job=$(mktemp -d)
    cat >"$job/job"
    (cd "$job" && echo job | busybox cpio -o -H newc 2>/dev/null)
    cat "/lab/${1:-}initramfs"
    ! grep -q -w fio "$job/job" || cat /lab/fio-initramfs
    rm -r "$job"
}

console() { tr -d '\r' <"$CONSOLES/guest-$1.log" 2>/dev/null || true; }

# says NAME REGEX: the guest's console has such a line
says() { console "$1" | grep -a -q -e "$2"; }

gone() { ! xl list "$1" >/dev/null 2>&1; }

# wait_line NAME REGEX SECONDS
wait_line() {
    within "$3" says "$1" "$2" && return
    console "$1" | tail -n 40
    fail "guest $1 does not say '$2' within $3 s"
}

# wait_guest NAME SECONDS: until its job has succeeded and it is gone
wait_guest() {
    wait_line "$1" '^guest: rc=' "$2"
    console "$1" | grep -a -v '^\['
    says "$1" '^guest: rc=0' || fail "the job of guest $1 failed: $(console "$1" | grep -a '^guest: rc=')"
    within 30 gone "$1" || fail "guest $1 does not go away"
}

# result NAME KEY: the value of the guest's last line "RESULT KEY VALUE"
result() { console "$1" | sed -n "s/^RESULT $2 //p" | tail -n 1; }

# backend NAME: the store's directory of the backend of the guest's xvda
backend() { xenstore-read "/local/domain/$(xl domid "$1")/device/vbd/51712/backend"; }

# --- the daemon under test

xbd() { python3 -P -c 'from xbd.cli import main; main()' "$@"; }

answers() { [ -S /run/xbd/control.sock ] && ! dead; }

start_daemon() {
    rm -f /run/xbd/control.sock     # what a killed daemon left
    {
        printf '[backend]\nimage_dirs = ["/srv/images"]\ndatapath = "%s"\n' "$DATAPATH"
        [ "$SUITE" != bookworm ] || printf 'kinds = ["vbd"]\n'
    } >/tmp/xbd.toml
    python3 -P -c 'from xbd.cli import main; main()' serve --config /tmp/xbd.toml >>/var/log/xbd.log 2>&1 &
    echo $! >/run/xbd.pid
    within 150 answers     # 8 s if nothing else runs on the machine
}

stop_daemon() {
    kill "$(cat /run/xbd.pid)"
    within 30 dead
}

kill_daemon() {
    kill -9 "$(cat /run/xbd.pid)"
    within 10 dead
}

dead() { ! kill -0 "$(cat /run/xbd.pid)" 2>/dev/null; }

# --- what must be the same at the end as at the beginning

traces() {
    echo "domains: $(xl list | awk 'NR > 1 { print $1 }' | xargs)"
    echo "event channels of dom0: $(lsevtchn 0 | grep -c -v -i virq)"
    echo "loop devices: $(losetup -a | wc -l)"
    for kind in vbd vbd3 qdisk; do
        echo "backend/$kind: $(xenstore-ls -f "/local/domain/0/backend/$kind" 2>/dev/null | grep -c -w state)"
    done
    echo "frontends in dom0: $(xenstore-ls -f /local/domain/0/device/vbd 2>/dev/null | grep -c -w state)"
    echo "libxl: $(xenstore-list /libxl 2>/dev/null | grep -v '^0$' | xargs)"
    echo "libxl, dom0's disks: $(xenstore-list /libxl/0/device/vbd 2>/dev/null | xargs)"
    echo "error nodes: $(xenstore-ls -f /local/domain/0/error 2>/dev/null | wc -l)"
    echo "granted to dom0: $(grants)"
    if [ "$BACKEND" = xbd ]; then
        pid=$(cat /run/xbd.pid)
        echo "mappings of grants in xbd: $(grep -c -e gntdev "/proc/$pid/maps")"
        echo "open images in xbd: $(find "/proc/$pid/fd" -lname '/scratch/*' | wc -l)"
    fi
}

# grants: entries of all grant tables that are in use; where a page is still mapped its dead domain stays
grants() {
    xl debug-keys g
    xl dmesg | awk '/gnttab_usage_print_all \[/ { n = 0 } /\[0x[0-9a-f]+\]/ { n++ } END { print n + 0 }'
}
