// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package ipamhooks

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"
)

// ErrResult is a CNI result that cannot be read.
var ErrResult = errors.New("unreadable CNI result")

// ParseResult reads the result that goes with a configuration of the given CNI
// version, 0.3.0 or later, and returns it in that version. It fails with
// [ErrResult].
func ParseResult(cniVersion string, raw []byte) (types.Result, error) {
	var shape struct {
		CNIVersion string            `json:"cniVersion"`
		Interfaces []json.RawMessage `json:"interfaces"`
		IPs        []json.RawMessage `json:"ips"`
	}
	if err := json.Unmarshal(raw, &shape); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrResult, err)
	}
	// libcni's converters follow the pointers that null leaves nil.
	null := func(m json.RawMessage) bool { return string(m) == "null" }
	if slices.ContainsFunc(shape.Interfaces, null) || slices.ContainsFunc(shape.IPs, null) {
		return nil, fmt.Errorf("%w: null among its interfaces or ips", ErrResult)
	}
	if shape.CNIVersion == "" {
		// Results of versions before 1.0.0 may come without one; they then
		// have that of the configuration.
		var err error
		if raw, err = setKey(raw, "cniVersion", cniVersion); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrResult, err)
		}
		shape.CNIVersion = cniVersion
	}
	result, err := create.Create(shape.CNIVersion, raw)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrResult, err)
	}
	if result, err = result.GetAsVersion(cniVersion); err != nil {
		return nil, fmt.Errorf("%w: as version %s: %w", ErrResult, cniVersion, err)
	}
	return result, nil
}

// Interface of a pod and the addresses that a result gives it.
type Interface struct {
	Name      string
	Addresses []netip.Addr
	// Gateways of the addresses, where the result names them.
	Gateways []netip.Addr
}

// PodInterfaces returns the interfaces of the pod that a result names, that of
// the attachment (CNI_IFNAME) first and whether the result lists it or not.
//
// An interface is the pod's when it has a sandbox; some plugins use the sandbox
// of placeholder interfaces for notes to themselves, so that only the pod's
// network namespace can tell whether the others exist. An address belongs to
// the interface it points to, or to the attachment's when it points to none or
// to one of the host.
func PodInterfaces(result types.Result, ifName string) ([]Interface, error) {
	r, err := types100.NewResultFromResult(result)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrResult, err)
	}
	pod := []Interface{{Name: ifName}}
	// position of a result's interface in pod; those that are not there are
	// the attachment's.
	position := map[int]int{}
	for i, iface := range r.Interfaces {
		if iface.Sandbox == "" {
			continue
		}
		at := slices.IndexFunc(pod, func(p Interface) bool { return p.Name == iface.Name })
		if at < 0 {
			at = len(pod)
			pod = append(pod, Interface{Name: iface.Name})
		}
		position[i] = at
	}
	for _, ip := range r.IPs {
		address, err := address(ip.Address)
		if err != nil {
			return nil, err
		}
		at := 0
		if ip.Interface != nil {
			at = position[*ip.Interface]
		}
		pod[at].Addresses = append(pod[at].Addresses, address)
		if gateway, ok := netip.AddrFromSlice(ip.Gateway); ok {
			pod[at].Gateways = append(pod[at].Gateways, gateway.Unmap())
		}
	}
	return pod, nil
}

// Addresses of a result, whichever interface they are on.
func Addresses(result types.Result) ([]netip.Addr, error) {
	pod, err := PodInterfaces(result, "")
	if err != nil {
		return nil, err
	}
	var all []netip.Addr
	for _, i := range pod {
		all = append(all, i.Addresses...)
	}
	return all, nil
}

func address(n net.IPNet) (netip.Addr, error) {
	a, ok := netip.AddrFromSlice(n.IP)
	if a = a.Unmap(); !ok || a.IsUnspecified() {
		return netip.Addr{}, fmt.Errorf("%w: %q is not the address of an interface", ErrResult, n.String())
	}
	return a, nil
}

// setKey sets one key of a JSON object and leaves the others as they are.
func setKey(object []byte, key string, value any) ([]byte, error) {
	var keys map[string]json.RawMessage
	if err := json.Unmarshal(object, &keys); err != nil {
		return nil, err
	}
	if keys == nil {
		return nil, errors.New("not a JSON object")
	}
	v, err := json.Marshal(value)
	if err != nil {
		return nil, err
	}
	keys[key] = v
	return json.Marshal(keys)
}
