// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/podgate/podgate/conf"
	ipamhooks "github.com/podgate/podgate/ipam-hooks"
	"github.com/podgate/podgate/pinning"
)

// attachment is what ADD and CHECK are about: the interfaces that the plugins
// before us have made.
type attachment struct {
	args   *skel.CmdArgs
	conf   *conf.NetConf
	pod    podArgs
	result types.Result
}

// attachment reads the parameters of ADD or CHECK.
func (c *call) attachment(args *skel.CmdArgs) (*attachment, error) {
	a := &attachment{args: args}
	var err error
	if a.conf, err = conf.Parse(args.StdinData); err != nil {
		return nil, err
	}
	if a.pod, err = parseArgs(args.Args); err != nil {
		return nil, err
	}
	if a.conf.PrevResult == nil {
		return nil, errNoPrevResult
	}
	a.result, err = ipamhooks.ParseResult(c.cniVersion, a.conf.PrevResult)
	if err != nil {
		return nil, fmt.Errorf("prevResult: %w", err)
	}
	return a, nil
}

// endpoints finds the veth of every interface of the pod and how ADD is to gate
// it. The first is that of CNI_IFNAME, unless the interface is no veth and those
// are skipped.
func (a *attachment) endpoints(logger *slog.Logger) ([]pinning.AddRequest, error) {
	interfaces, err := ipamhooks.PodInterfaces(a.result, a.args.IfName)
	if err != nil {
		return nil, fmt.Errorf("prevResult: %w", err)
	}
	override := a.args.NetnsOverride == "1" || strings.EqualFold(a.args.NetnsOverride, "true")
	ns, err := openNetNS(a.args.Netns, override)
	if err != nil {
		return nil, err
	}
	defer ns.close()
	var requests []pinning.AddRequest
	for _, i := range interfaces {
		v, err := ns.veth(i.Name)
		switch {
		case errors.Is(err, errNoInterface) && i.Name != a.args.IfName:
			// A placeholder of the main plugin.
			logger.Debug("interface of prevResult is not in the pod", "interface", i.Name)
		case errors.Is(err, errNotVeth) && a.conf.NonVeth == conf.NonVethSkip:
			logger.Warn("interface is not gated", "interface", i.Name, "reason", err)
		case err != nil:
			return nil, err
		default:
			requests = append(requests, pinning.AddRequest{
				Endpoint: a.endpoint(i, v), Bridge: v.peer.Attrs().MasterIndex, Gateways: i.Gateways,
				Attach: a.attach(), Wait: time.Duration(a.conf.WaitForPolicy),
			})
		}
	}
	for i := range requests {
		requests[i].Interfaces = len(requests)
	}
	return requests, nil
}

func (a *attachment) endpoint(i ipamhooks.Interface, v *veth) pinning.Endpoint {
	mac := v.pod.Attrs().HardwareAddr
	if i.Name == a.args.IfName && a.conf.Runtime.MAC != nil {
		mac = a.conf.Runtime.MAC
	}
	return pinning.Endpoint{
		Key:          pinning.AttachmentKey{ContainerID: a.args.ContainerID, IfName: i.Name},
		CNIIfName:    a.args.IfName,
		HostIfindex:  v.peer.Attrs().Index,
		MAC:          net.HardwareAddr(mac),
		Network:      a.conf.Name,
		NetNS:        a.args.Netns,
		PodUID:       a.pod.uid,
		PodNamespace: a.pod.namespace,
		PodName:      a.pod.name,
		Labels:       a.conf.Labels,
		Addresses:    v.own(i.Addresses, mac),
		AntiSpoof:    a.conf.AntiSpoof,
		Audit:        a.conf.Audit,
		Mode:         mode(a.conf.Mode),
	}
}

func mode(m conf.Mode) pinning.Mode {
	if m == conf.ModeOpen {
		return pinning.ModeOpen
	}
	return pinning.ModeClosed
}
