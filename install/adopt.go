// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package install

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"slices"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/install/conflist"
	"github.com/podgate/podgate/pinning"
)

// AdoptOptions of [Adopt]. Paths are absolute.
type AdoptOptions struct {
	// ConfDir has the networks, BinDir the plugins.
	ConfDir, BinDir string
	// CacheDir is where runtimes keep what they attached containers with:
	// "/var/lib/cni", libcni's default.
	CacheDir string
	// Pins is the pinned state.
	Pins   pinning.Options
	Logger *slog.Logger
	// DryRun changes nothing.
	DryRun bool
}

// Adopted is a container that was attached before podgate was there.
type Adopted struct {
	pinning.AttachmentKey
	Network string `json:"network"`
	// Pod is its namespace and name, if it is one.
	Pod string `json:"pod,omitempty"`
	// Connections that go on.
	Connections int `json:"connections"`
	// Error says why it is not gated.
	Error string `json:"error,omitempty"`
}

// Adopt gates the containers that runtimes have attached to networks with
// podgate-cni in their list before it was there: it calls podgate-cni as the
// runtime would have, with what libcni kept of that. Open TCP connections go on
// where policy allows them. Until a container's policy is known its gate is
// open, whatever the list says, since it was so before. Containers that are
// gated are left alone.
func Adopt(ctx context.Context, o AdoptOptions) ([]Adopted, error) {
	networks, err := conflist.Gated(o.ConfDir)
	if err != nil {
		return nil, err
	}
	state, err := pinning.Open(ctx, o.Pins)
	if err != nil {
		return nil, err
	}
	defer state.Close()
	// What another version has gated was not started before podgate.
	if _, err := state.Inherit(ctx); err != nil {
		return nil, err
	}
	a := &adoption{AdoptOptions: o, state: state, exec: &invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: os.Stderr}}}
	a.cni = libcni.NewCNIConfigWithCacheDir([]string{o.BinDir}, o.CacheDir, a.exec)
	attachments, err := a.cni.GetCachedAttachments("")
	if err != nil {
		return nil, fmt.Errorf("cache of libcni: %w", err)
	}
	adopted := []Adopted{}
	for _, at := range attachments {
		if err := ctx.Err(); err != nil {
			return adopted, err
		}
		i := slices.IndexFunc(networks, func(n *libcni.NetworkConfigList) bool { return n.Name == at.Network })
		if i < 0 {
			continue
		}
		key := pinning.AttachmentKey{ContainerID: at.ContainerID, IfName: at.IfName}
		if _, _, err := state.Endpoint(key); err == nil {
			continue
		} else if !errors.Is(err, pinning.ErrNotFound) {
			return adopted, err
		}
		done := Adopted{AttachmentKey: key, Network: at.Network, Pod: podOf(at)}
		result, err := a.result(networks[i], at)
		if err == nil && ns.IsNSorErr(at.NetNS) != nil {
			continue // The cache has outlived the container.
		}
		if err == nil && !o.DryRun {
			done.Connections, err = a.adopt(ctx, networks[i], at, result)
		}
		if err != nil {
			done.Error = err.Error()
		}
		adopted = append(adopted, done)
	}
	return adopted, nil
}

type adoption struct {
	AdoptOptions
	state *pinning.State
	exec  invoke.Exec
	cni   *libcni.CNIConfig
}

// result is what the plugins of then have made. Where the cache does not name
// the network namespace, as that of older libcni does not, the result does.
func (a *adoption) result(list *libcni.NetworkConfigList, at *libcni.NetworkAttachment) (types.Result, error) {
	result, err := a.cni.GetNetworkListCachedResult(list, &libcni.RuntimeConf{ContainerID: at.ContainerID, IfName: at.IfName})
	if err != nil {
		return nil, err
	}
	if result == nil {
		return nil, fmt.Errorf("the runtime has no result of network %s", list.Name)
	}
	if at.NetNS != "" {
		return result, nil
	}
	r, err := types100.NewResultFromResult(result)
	if err != nil {
		return nil, err
	}
	for _, i := range r.Interfaces {
		if i.Name == at.IfName && i.Sandbox != "" {
			at.NetNS = i.Sandbox
		}
	}
	if at.NetNS == "" {
		return nil, errors.New("the runtime has not kept its network namespace")
	}
	return result, nil
}

func (a *adoption) adopt(ctx context.Context, list *libcni.NetworkConfigList, at *libcni.NetworkAttachment, result types.Result) (int, error) {
	config, err := config(list, at, result)
	if err != nil {
		return 0, err
	}
	plugin, err := a.exec.FindInPath(pluginName, []string{a.BinDir})
	if err != nil {
		return 0, err
	}
	if _, err := invoke.ExecPluginWithResult(ctx, plugin, config.Bytes, &invoke.Args{
		Command: "ADD", ContainerID: at.ContainerID, NetNS: at.NetNS, PluginArgs: at.CniArgs, IfName: at.IfName, Path: a.BinDir,
	}, a.exec); err != nil {
		return 0, err
	}
	key := pinning.AttachmentKey{ContainerID: at.ContainerID, IfName: at.IfName}
	e, _, err := a.state.Endpoint(key)
	if errors.Is(err, pinning.ErrNotFound) {
		return 0, nil // Of a kind that the list says to leave alone.
	}
	if err != nil {
		return 0, err
	}
	open, err := connections(at.NetNS, e.Addresses)
	if err != nil {
		return 0, fmt.Errorf("open connections: %w", err)
	}
	return len(open), a.state.Adopt(key, open)
}

// config is what libcni would give podgate-cni (CNI specification, section 2).
func config(list *libcni.NetworkConfigList, at *libcni.NetworkAttachment, result types.Result) (*libcni.PluginConfig, error) {
	i := slices.IndexFunc(list.Plugins, func(p *libcni.PluginConfig) bool { return p.Network.Type == pluginName })
	if i < 0 {
		return nil, fmt.Errorf("network %s: %w", list.Name, conflist.ErrNoPlugins)
	}
	plugin := list.Plugins[i]
	values := map[string]any{"name": list.Name, "cniVersion": list.CNIVersion, "prevResult": result, "mode": "open"}
	capabilities := maps.Clone(at.CapabilityArgs)
	maps.DeleteFunc(capabilities, func(name string, _ any) bool { return !plugin.Network.Capabilities[name] })
	if len(capabilities) > 0 {
		values["runtimeConfig"] = capabilities
	}
	return libcni.InjectConf(plugin, values)
}

func podOf(at *libcni.NetworkAttachment) string {
	var namespace, name string
	for _, pair := range at.CniArgs {
		switch pair[0] {
		case "K8S_POD_NAMESPACE":
			namespace = pair[1]
		case "K8S_POD_NAME":
			name = pair[1]
		}
	}
	if name == "" {
		return ""
	}
	return namespace + "/" + name
}

// TCP states (net/tcp_states.h): of sockets whose connection may still carry
// something, and of those that wait for one.
const (
	tcpEstablished = 1
	tcpFinWait1    = 4
	tcpFinWait2    = 5
	tcpCloseWait   = 8
	tcpListen      = 10
)

// connections are the open TCP connections of a network namespace from one of
// the addresses (sock_diag(7)). One to a port that somebody there listens on was
// opened by the other side.
func connections(path string, own []netip.Addr) ([]pinning.OpenFlow, error) {
	pod, err := netns.GetFromPath(path)
	if err != nil {
		return nil, err
	}
	defer pod.Close()
	h, err := netlink.NewHandleAt(pod, unix.NETLINK_INET_DIAG)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	var all []*netlink.Socket
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		sockets, err := diag(h, family)
		if err != nil {
			return nil, err
		}
		all = append(all, sockets...)
	}
	listening := map[uint16]struct{}{}
	for _, s := range all {
		if s.State == tcpListen {
			listening[s.ID.SourcePort] = struct{}{}
		}
	}
	var open []pinning.OpenFlow
	for _, s := range all {
		switch s.State {
		case tcpEstablished, tcpFinWait1, tcpFinWait2, tcpCloseWait:
		default:
			continue
		}
		local, okLocal := netip.AddrFromSlice(s.ID.Source)
		peer, okPeer := netip.AddrFromSlice(s.ID.Destination)
		local, peer = local.Unmap(), peer.Unmap()
		if !okLocal || !okPeer || !slices.Contains(own, local) {
			continue
		}
		o := pinning.OpenFlow{
			Opened: policy.Egress,
			Local:  netip.AddrPortFrom(local, s.ID.SourcePort), Peer: netip.AddrPortFrom(peer, s.ID.DestinationPort),
		}
		if _, ok := listening[s.ID.SourcePort]; ok {
			o.Opened = policy.Ingress
		}
		open = append(open, o)
	}
	return open, nil
}

// diag lists sockets. The kernel interrupts a list that changes under it.
func diag(h *netlink.Handle, family uint8) (sockets []*netlink.Socket, err error) {
	for range 5 {
		sockets, err = h.SocketDiagTCP(family)
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return sockets, err
		}
	}
	return sockets, nil
}
