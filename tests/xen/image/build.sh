# shellcheck shell=bash disable=SC2154
# How an image is made; sourced by `lab`, which sets: here, cache, mirror, keyring, die, require.
# An image's name has a hash of this folder in it: whatever changes an image belongs in here.

xen_version() {
    case $1 in
        trixie) echo 4.20 ;;
        bookworm) echo 4.17 ;;
        *) die "no suite '$1': trixie or bookworm" ;;
    esac
}

packages() { # SUITE: what dom0 has
    local xen; xen=$(xen_version "$1")
    sed -e 's/#.*//' -e "s/@XEN@/$xen/g" "$here/image/packages" | tr -s ' \n' ',,' | sed 's/^,//;s/,$//'
}

image_dir() { # SUITE: where its image is kept, named by the hash of all that it is made from
    local hash
    hash=$({ echo "$1"; packages "$1"; cat "$here"/image/*; } | sha256sum | cut -c1-16)
    echo "$cache/$1-$hash"
}

debootstrap() { # SUITE OUT_TAR MMDEBSTRAP_OPTION...
    local suite=$1 out=$2; shift 2
    printf '%s\n' \
        "deb [signed-by=$keyring] $mirror $suite main" \
        "deb [signed-by=$keyring] $mirror $suite-updates main" |
        mmdebstrap --quiet --aptopt='APT::Install-Recommends "false"' "$@" "$suite" "$out" -
}

# --- the small systems that run from memory: busybox, kernel modules in load order, a few programs

busybox_tree() { # TREE ROOT
    local applet
    mkdir -p "$1"/{bin,usr/bin,dev,proc,sys,tmp,run,mnt,etc}
    cp "$2/usr/bin/busybox" "$1/bin/busybox"
    for applet in $("$1/bin/busybox" --list); do
        [ "$applet" = busybox ] || ln -sf busybox "$1/bin/$applet"
    done
}

add_modules() { # TREE ROOT MODULE...: the modules and all they depend on; order in /modules/order
    local tree=$1 modules dependency line name file
    modules=$(echo "$2"/usr/lib/modules/*); shift 2
    mkdir -p "$tree/modules"; touch "$tree/modules/order"
    for name; do
        # modules.dep: "path: dependencies, the nearest first". A module that is built in is not there.
        line=$(grep -E "/${name//[-_]/[-_]}\.ko(\.xz)?:" "$modules/modules.dep") || continue
        # shellcheck disable=SC2086  # the dependencies are words
        for dependency in $(printf '%s\n' ${line#*:} | tac) "${line%%:*}"; do
            file=$(basename "$dependency" .xz)
            if grep -qxF "$file" "$tree/modules/order"; then continue; fi
            case $dependency in     # busybox's insmod wants them unpacked
                *.xz) xz -dc "$modules/$dependency" >"$tree/modules/$file" ;;
                *) cp "$modules/$dependency" "$tree/modules/$file" ;;
            esac
            echo "$file" >>"$tree/modules/order"
        done
    done
}

add_program() { # TREE ROOT PROGRAM NAME: a program with the libraries it is linked with
    local tree=$1 root=$2 program=$3 libraries=$2/usr/lib/x86_64-linux-gnu needed path
    local queue=("$root$program")
    mkdir -p "$tree/lib64" "$tree/lib/x86_64-linux-gnu" "$tree/usr/bin"
    cp -L "$root$program" "$tree/usr/bin/$4"
    cp -L "$root/lib64/ld-linux-x86-64.so.2" "$tree/lib64/"
    while [ ${#queue[@]} -gt 0 ]; do
        for needed in $(objdump -p "${queue[0]}" | awk '$1 == "NEEDED" { print $2 }'); do
            [ ! -e "$tree/lib/x86_64-linux-gnu/$needed" ] || continue
            path=$(find "$libraries" -name "$needed" -print -quit)
            [ -n "$path" ] || continue
            cp -L "$path" "$tree/lib/x86_64-linux-gnu/$needed"
            queue+=("$path")
        done
        queue=("${queue[@]:1}")
    done
}

pack() { # TREE OUT: an initramfs, not compressed (that is slow to undo, emulated); removes the tree
    (cd "$1" && find . | cpio --quiet -o -H newc -R 0:0) >"$2"
    rm -rf "$1"
}

dom0_initramfs() { # ROOT OUT
    local tree; tree=$(mktemp -d)
    busybox_tree "$tree" "$1"
    mkdir -p "$tree"/{base,upper,root}
    add_modules "$tree" "$1" virtio_pci virtio_blk ext4 crc32c_generic overlay 9p 9pnet_virtio \
        xenfs xen-privcmd xen-evtchn xen-gntdev xen-gntalloc
    install -m 755 "$here/image/dom0-initramfs-init" "$tree/init"
    pack "$tree" "$2"
}

guest_initramfs() { # ROOT_WITH_KERNEL ROOT_WITH_PROGRAMS OUT
    local tree; tree=$(mktemp -d)
    busybox_tree "$tree" "$2"
    add_modules "$tree" "$1" xen-blkfront ext4 crc32c_generic
    add_program "$tree" "$2" /usr/sbin/e2fsck e2fsck
    add_program "$tree" "$2" /usr/sbin/mke2fs mkfs.ext4     # busybox has a mke2fs, for ext2 alone
    cp "$2/etc/mke2fs.conf" "$tree/etc/"
    install -m 755 "$here/image/guest-init" "$tree/init"
    pack "$tree" "$3"
}

add_foreign_kernel() { # ROOT: bookworm's kernel for guests (GRUB's Xen image cannot unpack newer ones)
    local root=$1 other=$1/foreign version
    mkdir -p "$other/usr/lib"
    debootstrap bookworm "$other.tar" --variant=extract --include=linux-image-amd64
    tar -C "$other" -xf "$other.tar" --wildcards './boot/vmlinuz-*' './lib/modules'
    rm "$other.tar"
    ln -s ../../lib/modules "$other/usr/lib/modules"
    version=$(basename "$other"/lib/modules/*)
    chroot "$root" depmod --basedir /foreign "$version"
    cp "$other/boot/vmlinuz-$version" "$root/lab/bookworm-vmlinuz"
    guest_initramfs "$other" "$root" "$root/lab/bookworm-initramfs"
    rm -r "$other"
}

fio_initramfs() { # ROOT OUT: comes behind a guest's initramfs; most of it are libraries that fio never calls
    local tree; tree=$(mktemp -d)
    add_program "$tree" "$1" /usr/bin/fio fio
    pack "$tree" "$2"
}

bios_boot_loader() { # ROOT: GRUB for a disk with a partition table; boot.img is its first sector,
    # core.img begins in the second one and finds its configuration in the first partition
    chroot "$1" grub-mkimage -O i386-pc -p '(hd0,msdos1)/boot/grub' -o /lab/core.img \
        biosdisk part_msdos ext2 normal linux boot
    cp "$1/usr/lib/grub/i386-pc/boot.img" "$1/lab/"
}

build() { # SUITE
    local suite=$1 target work root xen
    target=$(image_dir "$suite")
    xen=$(xen_version "$suite")
    if [ ! -e "$target/dom0.img" ]; then
        require
        [ "$(id -u)" = 0 ] || die "building an image needs root"
        mkdir -p "$cache"
        exec 9>"$cache/lock"; flock 9
    fi
    if [ ! -e "$target/dom0.img" ]; then
        echo "lab: building $suite (about two minutes)" >&2
        work=$(mktemp -d "$cache/build.XXXXXX"); root=$work/root
        # shellcheck disable=SC2064  # the name as it is now
        trap "rm -rf '$work'" EXIT
        mkdir -p "$root"
        debootstrap "$suite" "$work/root.tar" --variant=minbase --include="$(packages "$suite")"
        tar -C "$root" -xf "$work/root.tar"; rm "$work/root.tar"
        mkdir -p "$root"/{host,lab,scratch,payload}
        install -m 755 "$here/image/dom0-init" "$root/lab/init"
        gunzip -c "$root/boot/xen-$xen-amd64.gz" >"$work/xen"       # QEMU's multiboot wants it unpacked
        cp "$root"/boot/vmlinuz-* "$work/vmlinuz"
        cp "$work/vmlinuz" "$root/lab/vmlinuz"
        dom0_initramfs "$root" "$work/dom0-initramfs"
        guest_initramfs "$root" "$root" "$root/lab/initramfs"
        fio_initramfs "$root" "$root/lab/fio-initramfs"
        bios_boot_loader "$root"
        if [ "$suite" = bookworm ]; then
            ln -s vmlinuz "$root/lab/bookworm-vmlinuz"; ln -s initramfs "$root/lab/bookworm-initramfs"
        else
            add_foreign_kernel "$root"
        fi
        rm -rf "$root"/usr/share/{doc,man,locale,i18n} "$root"/var/{cache/apt,lib/apt/lists}
        rm -rf "${root:?}"/boot/*
        truncate -s 4G "$work/dom0.img"
        mkfs.ext4 -q -F -O ^has_journal -d "$root" "$work/dom0.img"
        rm -rf "$cache/$suite"-*        # what the changed scripts have replaced
        mv "$work" "$target"
        trap - EXIT
    fi
    echo "$target"
}
