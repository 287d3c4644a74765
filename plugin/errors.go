// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"io/fs"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/podgate/podgate/conf"
	ipamhooks "github.com/podgate/podgate/ipam-hooks"
	"github.com/podgate/podgate/pinning"
)

// Error codes of our own (CNI specification 1.1, section 5: 100 and above).
const (
	// codeNotVeth: an interface of the pod has no veth peer on this host.
	codeNotVeth uint = 100 + iota
	// codeNoInterface: the pod has no interface CNI_IFNAME.
	codeNoInterface
	// codeNoHook: neither kind of hook can be attached to the veth.
	codeNoHook
	// codeFull: a map has no room for the pod.
	codeFull
	// codeState: the pinned state is of another version of podgate.
	codeState
	// codeCheck: CHECK found the gate gone or changed.
	codeCheck
)

// Faults of a call that no package below knows.
var (
	errArgs         = errors.New("bad CNI_ARGS")
	errNoPrevResult = errors.New("no prevResult: podgate-cni must come after the plugin that makes the interface")
	errNotReady     = errors.New("not ready")
	errCheck        = errors.New("gate differs")
)

// coded gives err its CNI error code. An error of a delegate keeps the code that
// the delegate gave.
func coded(err error) error {
	if err == nil {
		return nil
	}
	e := &types.Error{Code: code(err), Msg: err.Error()}
	var delegate *types.Error
	if errors.As(err, &delegate) {
		e.Code, e.Details = delegate.Code, delegate.Details
	}
	return e
}

// code of an error; the first match counts.
func code(err error) uint {
	for _, c := range []struct {
		err  error
		code uint
	}{
		{errNotReady, types.ErrPluginNotAvailable},
		{errArgs, types.ErrInvalidEnvironmentVariables},
		{errNoPrevResult, types.ErrInvalidNetworkConfig},
		{errNetNS, types.ErrInvalidNetNS},
		{errNotVeth, codeNotVeth},
		{errNoInterface, codeNoInterface},
		{conf.ErrDecode, types.ErrDecodingFailure},
		{conf.ErrInvalid, types.ErrInvalidNetworkConfig},
		{ipamhooks.ErrResult, types.ErrDecodingFailure},
		{pinning.ErrNoHook, codeNoHook},
		{pinning.ErrInvalid, types.ErrInvalidNetworkConfig},
		{pinning.ErrFull, codeFull},
		{pinning.ErrABI, codeState},
		{pinning.ErrLocked, types.ErrTryAgainLater},
		{context.DeadlineExceeded, types.ErrTryAgainLater},
		{pinning.ErrDiffers, codeCheck},
		{errCheck, codeCheck},
	} {
		if errors.Is(err, c.err) {
			return c.code
		}
	}
	if errors.As(err, new(*fs.PathError)) {
		return types.ErrIOFailure
	}
	return types.ErrInternal
}
