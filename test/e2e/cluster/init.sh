# Copyright The podgate Authors
# SPDX-License-Identifier: Apache-2.0
#
# PID 1 of a machine: it makes the machine's own view of the file system, and
# then reaps. A node has /run, /etc, /var and /opt of its own, whose changes stay
# in memory, its own bpffs and its own /sys.
#
# Environment: NAME of the machine, KIND (control-plane or node), DIR of the
# machine outside, CGROUP: path of the machine's in each hierarchy.
set -e
mount --make-rslave /
mount -t proc proc /proc
hostname "$NAME"
if [[ $KIND == node ]]; then
	m=$DIR/mnt
	mkdir -p "$m" "$DIR"/{containerd,kubelet,pods}
	mount -t tmpfs -o mode=755 tmpfs "$m"
	mkdir "$m"/{cgroup,containerd,kubelet,pods,files}
	for d in containerd kubelet pods files; do mount --bind "$DIR/$d" "$m/$d"; done

	mount --rbind /sys/fs/cgroup "$m/cgroup"
	mount -t sysfs sysfs /sys # shows this network namespace
	mount --rbind "$m/cgroup" /sys/fs/cgroup
	umount -l "$m/cgroup"
	mount -t bpf bpf /sys/fs/bpf # shows this node's pins

	for d in etc var opt; do
		mkdir "$m/upper-$d" "$m/work-$d"
		mount -t overlay -o "lowerdir=/$d,upperdir=$m/upper-$d,workdir=$m/work-$d" overlay "/$d"
	done
	mount -t tmpfs -o mode=755 tmpfs /run
	mkdir -p /run/netns /run/lock /var/lib/{containerd,kubelet,cni} /var/log/{pods,containers}
	mkdir -p /etc/{containerd,kubernetes} /etc/cni/net.d /opt/cni/bin
	rm -f /etc/cni/net.d/*
	# The snapshots of containerd cannot be on an overlay.
	mount --bind "$m/containerd" /var/lib/containerd
	mount --bind "$m/kubelet" /var/lib/kubelet
	mount --bind "$m/pods" /var/log/pods
	cp -RL "$m/files/." /
	mount --make-rshared / # mounts of volumes propagate, inside this node

	# The kubelet sets these for the whole machine where it finds other values:
	# it is shown the values it wants.
	for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1; do
		file=$m/${setting//\//.}
		echo "${setting#*=}" >"$file"
		mount --bind "$file" "/proc/sys/${setting%=*}"
	done

	# A parent of this node's own in every hierarchy of cgroup v1, or in v2.
	if [[ -e /sys/fs/cgroup/cgroup.controllers ]]; then
		hierarchies=(/sys/fs/cgroup)
	else
		hierarchies=(/sys/fs/cgroup/*/)
	fi
	for hierarchy in "${hierarchies[@]}"; do
		[[ -e $hierarchy/cgroup.procs ]] || continue
		path=$hierarchy
		for part in ${CGROUP//\// }; do
			if [[ -e $path/cgroup.subtree_control ]]; then
				for c in $(<"$path/cgroup.controllers"); do echo "+$c" >"$path/cgroup.subtree_control" || true; done
			fi
			mkdir -p "$path/$part"
			if [[ -e $path/cpuset.mems ]]; then
				cat "$path/cpuset.mems" >"$path/$part/cpuset.mems"
				cat "$path/cpuset.cpus" >"$path/$part/cpuset.cpus"
			fi
			path=$path/$part
		done
	done
fi
echo ready
# bash reaps whatever is left to it while it waits.
while :; do
	sleep 3600 &
	wait $! || true # a reboot kills it
done
