// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/server4"

	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/test/netlab"
)

func (l *lab) delegating(delegate netlab.Plugin) netlab.Plugin {
	bridge := l.Bridge("br0")
	bridge["isGateway"] = delegate["type"] != "dhcp"
	bridge["ipam"] = netlab.Plugin{"type": "podgate-ipam", "bpffs": l.BPFFS, "delegate": delegate}
	return bridge
}

func TestDelegates(t *testing.T) {
	for name, delegate := range map[string]func(*lab) netlab.Plugin{
		"host-local": func(l *lab) netlab.Plugin { return l.HostLocal("10.91.0.0/24", "fd91::/64") },
		"static": func(*lab) netlab.Plugin {
			return netlab.Plugin{"type": "static", "addresses": []any{
				map[string]string{"address": "10.91.0.2/24"}, map[string]string{"address": "fd91::2/64"},
			}}
		},
		"dhcp": func(l *lab) netlab.Plugin { return l.dhcp("10.91.0.2") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			list := chain("1.1.0", l.delegating(delegate(l)), l.Podgate())
			for range 2 {
				p := l.pod(netlab.PodSpec{})
				result, err := l.Add(t.Context(), list, p)
				if err != nil {
					t.Fatal(err)
				}
				e := l.wantEndpoints(key(p))[key(p)]
				if !slices.Contains(e.Addresses, netip.MustParseAddr("10.91.0.2")) {
					t.Errorf("claimed %v of %v", e.Addresses, result)
				}
				if err := l.Check(t.Context(), list, p); err != nil {
					t.Errorf("CHECK: %v", err)
				}
				if err := l.Status(t.Context(), list); err != nil {
					t.Errorf("STATUS: %v", err)
				}
				valid := []types.GCAttachment{{ContainerID: p.ID, IfName: p.IfName}}
				if err := l.GC(t.Context(), list, &libcni.GCArgs{ValidAttachments: valid}); err != nil {
					t.Errorf("GC: %v", err)
				}
				l.wantEndpoints(key(p))
				for range 2 {
					if err := l.Del(t.Context(), list, p); err != nil {
						t.Errorf("DEL: %v", err)
					}
				}
				l.wantEndpoints()
				if name == "host-local" {
					l.forgetAddress("10.91.0.2")
				}
			}
		})
	}
}

// forgetAddress makes host-local begin at the start of its range again.
func (l *lab) forgetAddress(address string) {
	l.t.Helper()
	reserved, err := filepath.Glob(filepath.Join(l.Dir, "host-local", "*", "*"))
	if err != nil {
		l.t.Fatal(err)
	}
	for _, file := range reserved {
		if filepath.Base(file) == address {
			l.t.Errorf("address %s is still allocated", address)
		}
		if strings.HasPrefix(filepath.Base(file), "last_reserved_ip") {
			if err := os.Remove(file); err != nil {
				l.t.Fatal(err)
			}
		}
	}
}

// The address is claimed before anything else of the pod is known: that is what
// the delegate is for.
func TestDelegateClaimsAtAllocation(t *testing.T) {
	l := newLab(t)
	p := l.pod(netlab.PodSpec{})
	config := l.delegating(l.HostLocal("10.92.0.0/24")).With(netlab.Plugin{"cniVersion": "1.1.0", "name": "lab"})
	stdin, err := config.JSON()
	if err != nil {
		t.Fatal(err)
	}
	o := l.callRaw("podgate-ipam", "ADD", env(p), stdin)
	var result struct {
		IPs []struct{ Address string }
	}
	if err := json.Unmarshal(o.stdout, &result); o.code != 0 || err != nil || len(result.IPs) != 1 {
		t.Fatalf("exit %d, stdout %s", o.code, o.stdout)
	}
	if n := l.claims(); n != 1 {
		t.Errorf("%d addresses are claimed, want %s", n, result.IPs[0].Address)
	}
	l.silent(l.callRaw("podgate-ipam", "CHECK", env(p), stdin))
	l.silent(l.callRaw("podgate-ipam", "STATUS", nil, stdin))
	l.silent(l.callRaw("podgate-ipam", "DEL", env(p), stdin))
	l.silent(l.callRaw("podgate-ipam", "DEL", env(p), stdin))
	if n := l.claims(); n != 0 {
		t.Errorf("%d addresses are still claimed", n)
	}
}

// claims counts the addresses that are claimed on the node.
func (l *lab) claims() int {
	l.t.Helper()
	usage, err := l.state().Usage()
	if err != nil {
		l.t.Fatal(err)
	}
	i := slices.IndexFunc(usage, func(u pinning.MapUsage) bool { return u.Name == "claims" })
	if i < 0 {
		l.t.Fatalf("no claims in %v", usage)
	}
	return usage[i].Used
}

func TestDelegateErrors(t *testing.T) {
	l := newLab(t)
	for name, test := range map[string]struct {
		verb string
		ipam netlab.Plugin
		code uint
		says string
	}{
		"no delegate":             {"ADD", nil, types.ErrInvalidNetworkConfig, "delegate"},
		"delegate without a type": {"ADD", netlab.Plugin{"subnet": "10.0.0.0/8"}, types.ErrInvalidNetworkConfig, "type"},
		"no such plugin":          {"ADD", netlab.Plugin{"type": "no-such"}, types.ErrInvalidNetworkConfig, "no-such"},
		"path for a type":         {"ADD", netlab.Plugin{"type": "../host-local"}, types.ErrInvalidNetworkConfig, "../host-local"},
		"delegate that refuses":   {"ADD", netlab.Plugin{"type": "host-local"}, types.ErrInternal, "host-local"},
		"dhcp without its daemon": {"ADD", netlab.Plugin{"type": "dhcp", "daemonSocketPath": "/no/such"}, types.ErrInternal, "/no/such"},
	} {
		t.Run(name, func(t *testing.T) {
			l := &lab{Node: l.Node, t: t}
			ipam := netlab.Plugin{"type": "podgate-ipam", "bpffs": l.BPFFS}
			if test.ipam != nil {
				ipam["delegate"] = test.ipam
			}
			stdin, err := netlab.Plugin{"cniVersion": "1.1.0", "name": "lab", "type": "bridge", "ipam": ipam}.JSON()
			if err != nil {
				t.Fatal(err)
			}
			o := l.callRaw("podgate-ipam", test.verb, env(l.pod(netlab.PodSpec{})), stdin)
			if o.code == 0 || o.err.Code != test.code || !strings.Contains(o.err.Msg, test.says) {
				t.Errorf("exit %d, error %+v; want code %d saying %q", o.code, o.err, test.code, test.says)
			}
		})
	}
}

// dhcp starts the dhcp plugin's daemon on the node and, on a pod of the same
// bridge, a server that has one address to give.
func (l *lab) dhcp(address string) netlab.Plugin {
	l.t.Helper()
	l.dhcpServer(net.ParseIP(address))
	socket := filepath.Join(l.Dir, "dhcp.sock")
	daemon := exec.Command(filepath.Join(l.Plugins, "dhcp"), "daemon", "-socketpath", socket, "-broadcast=true")
	daemon.Stderr = l.t.Output()
	daemon.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := l.Do(daemon.Start); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		if err := daemon.Process.Kill(); err != nil {
			l.t.Error(err)
		}
		_ = daemon.Wait() // reports the kill
	})
	deadline := time.Now().Add(10 * time.Second)
	for {
		if _, err := os.Stat(socket); err == nil {
			return netlab.Plugin{"type": "dhcp", "daemonSocketPath": socket}
		}
		if time.Now().After(deadline) {
			l.t.Fatal("the dhcp daemon does not listen")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (l *lab) dhcpServer(address net.IP) {
	l.t.Helper()
	bridge := l.Bridge("br0")
	bridge["isGateway"] = false
	bridge["ipam"] = netlab.Plugin{"type": "static", "addresses": []any{map[string]string{"address": "10.91.0.1/24"}}}
	p, _ := l.add(netlab.Conflist{CNIVersion: "1.1.0", Name: "server", Plugins: []netlab.Plugin{bridge}}, netlab.PodSpec{})
	answer := func(conn net.PacketConn, _ net.Addr, request *dhcpv4.DHCPv4) {
		reply := map[dhcpv4.MessageType]dhcpv4.MessageType{
			dhcpv4.MessageTypeDiscover: dhcpv4.MessageTypeOffer,
			dhcpv4.MessageTypeRequest:  dhcpv4.MessageTypeAck,
		}[request.MessageType()]
		if reply == dhcpv4.MessageTypeNone {
			return
		}
		r, err := dhcpv4.NewReplyFromRequest(request,
			dhcpv4.WithMessageType(reply),
			dhcpv4.WithYourIP(address),
			dhcpv4.WithServerIP(net.IPv4(10, 91, 0, 1)),
			dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(10, 91, 0, 1))),
			dhcpv4.WithOption(dhcpv4.OptIPAddressLeaseTime(time.Hour)),
			dhcpv4.WithNetmask(net.CIDRMask(24, 32)),
			dhcpv4.WithRouter(net.IPv4(10, 91, 0, 1)),
		)
		if err == nil {
			_, err = conn.WriteTo(r.ToBytes(), &net.UDPAddr{IP: net.IPv4bcast, Port: dhcpv4.ClientPort})
		}
		if err != nil {
			l.t.Log(err)
		}
	}
	var server *server4.Server
	err := p.Do(func() (err error) {
		server, err = server4.NewServer("eth0", nil, answer)
		return err
	})
	if err != nil {
		l.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		_ = server.Serve() // reports the Close
		close(done)
	}()
	l.t.Cleanup(func() {
		server.Close()
		<-done
	})
}
