// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	metavalidation "k8s.io/apimachinery/pkg/apis/meta/v1/validation"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/podgate/podgate/bpf/policy"
)

// AnnotationAudit puts pods in audit mode if it is "true" on their Namespace, or
// where that is allowed on the Pod: what policy would deny passes, and is
// reported.
const AnnotationAudit = "podgate.io/audit"

// annotationMirror carries, on the API server's copy of a static pod, the UID
// that the kubelet and the runtime know the pod by.
const annotationMirror = corev1.MirrorPodAnnotationKey

// Pod translates a pod. Its key is its UID, or namespace/name without one; its
// addresses are those of its status, none once it has terminated because they
// may belong to another pod by then. Local is left to the caller.
//
// The error is an [*InvalidError] with every fault found. The pod that comes
// with it lacks the addresses and ports that are faulty.
func Pod(pod *corev1.Pod) (policy.Pod, error) {
	namespace := cmp.Or(pod.Namespace, metav1.NamespaceDefault)
	uid := cmp.Or(pod.Annotations[annotationMirror], string(pod.UID))

	errs := validateMeta(&pod.ObjectMeta, validation.IsDNS1123Subdomain)
	errs = append(errs, metavalidation.ValidateLabels(pod.Labels, field.NewPath("metadata", "labels"))...)
	audit, e := audited(&pod.ObjectMeta)
	errs = append(errs, e...)
	addresses, e := podAddresses(&pod.Status)
	errs = append(errs, e...)
	ports, e := namedPorts(&pod.Spec)
	errs = append(errs, e...)
	out := policy.Pod{
		Key:         PodKey(uid, namespace, pod.Name),
		UID:         uid,
		Namespace:   namespace,
		Name:        pod.Name,
		Labels:      maps.Clone(pod.Labels),
		Addresses:   addresses,
		Ports:       ports,
		HostNetwork: pod.Spec.HostNetwork,
		Terminating: pod.DeletionTimestamp != nil,
		Audit:       audit,
	}
	if len(errs) > 0 {
		return out, &InvalidError{KindPod, namespace, pod.Name, errs}
	}
	return out, nil
}

// PodKey is the key of a pod: its UID, or namespace/name when it has none.
func PodKey(uid, namespace, name string) policy.PodKey {
	return policy.PodKey(cmp.Or(uid, namespace+"/"+name))
}

// Namespace translates a namespace and adds the label
// kubernetes.io/metadata.name, which the API server gives every namespace.
func Namespace(ns *corev1.Namespace) policy.Namespace {
	return NamespaceOf(ns.Name, ns.Labels)
}

// NamespaceOf is the namespace with the given name and labels. Labels may be
// nil for a namespace that has no object.
func NamespaceOf(name string, labels map[string]string) policy.Namespace {
	out := make(map[string]string, len(labels)+1)
	maps.Copy(out, labels)
	out[corev1.LabelMetadataName] = name
	return policy.Namespace{Name: name, Labels: out}
}

// Audited reads [AnnotationAudit]; a value other than true and false is an
// [*InvalidError].
func Audited(kind string, meta *metav1.ObjectMeta) (bool, error) {
	on, errs := audited(meta)
	if len(errs) > 0 {
		return false, &InvalidError{kind, meta.Namespace, meta.Name, errs}
	}
	return on, nil
}

func audited(meta *metav1.ObjectMeta) (bool, field.ErrorList) {
	switch v, ok := meta.Annotations[AnnotationAudit]; {
	case v == "true":
		return true, nil
	case v == "false" || !ok:
		return false, nil
	default:
		return false, field.ErrorList{field.NotSupported(
			field.NewPath("metadata", "annotations").Key(AnnotationAudit), v, []string{"true", "false"})}
	}
}

// podAddresses are podIPs; podIP where an old object has nothing else.
func podAddresses(status *corev1.PodStatus) (out []netip.Addr, errs field.ErrorList) {
	if ended(status) {
		return nil, nil
	}
	path := field.NewPath("status", "podIPs")
	ips := status.PodIPs
	if len(ips) == 0 && status.PodIP != "" {
		path = field.NewPath("status", "podIP")
		ips = []corev1.PodIP{{IP: status.PodIP}}
	}
	for i, ip := range ips {
		a, err := netip.ParseAddr(ip.IP)
		switch {
		case err != nil || a.Zone() != "" || a.Is4In6() || a.IsUnspecified():
			at := path
			if len(status.PodIPs) > 0 {
				at = path.Index(i).Child("ip")
			}
			errs = append(errs, field.Invalid(at, ip.IP, "must be an IPv4 or IPv6 address"))
		case !slices.Contains(out, a):
			out = append(out, a)
		}
	}
	return out, errs
}

func isMirror(pod *corev1.Pod) bool { return pod.Annotations[annotationMirror] != "" }

func ended(status *corev1.PodStatus) bool {
	return status.Phase == corev1.PodSucceeded || status.Phase == corev1.PodFailed
}

// namedPorts collects the named ports of the containers that run with the pod:
// all containers and the init containers that are never waited for (sidecars).
// Of two ports with one name and protocol the first counts, as in kube-proxy.
func namedPorts(spec *corev1.PodSpec) (out []policy.NamedPort, errs field.ErrorList) {
	collect := func(c *corev1.Container, path *field.Path) {
		for i, p := range c.Ports {
			if p.Name == "" {
				continue
			}
			path := path.Child("ports").Index(i)
			proto, e := protocol(cmp.Or(p.Protocol, corev1.ProtocolTCP), path.Child("protocol"))
			if e != nil {
				errs = append(errs, e)
				continue
			}
			if msgs := validation.IsValidPortNum(int(p.ContainerPort)); len(msgs) > 0 {
				errs = append(errs, field.Invalid(path.Child("containerPort"), p.ContainerPort, msgs[0]))
				continue
			}
			if !slices.ContainsFunc(out, func(o policy.NamedPort) bool { return o.Name == p.Name && o.Protocol == proto }) {
				out = append(out, policy.NamedPort{Name: p.Name, Protocol: proto, Port: uint16(p.ContainerPort)})
			}
		}
	}
	path := field.NewPath("spec")
	for i := range spec.Containers {
		collect(&spec.Containers[i], path.Child("containers").Index(i))
	}
	for i := range spec.InitContainers {
		c := &spec.InitContainers[i]
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			collect(c, path.Child("initContainers").Index(i))
		}
	}
	return out, errs
}

func protocol(p corev1.Protocol, path *field.Path) (policy.Protocol, *field.Error) {
	switch p {
	case corev1.ProtocolTCP:
		return policy.TCP, nil
	case corev1.ProtocolUDP:
		return policy.UDP, nil
	case corev1.ProtocolSCTP:
		return policy.SCTP, nil
	}
	return 0, field.NotSupported(path, p, []corev1.Protocol{corev1.ProtocolSCTP, corev1.ProtocolTCP, corev1.ProtocolUDP})
}

// validateMeta checks the names, which end up in keys and in output.
func validateMeta(meta *metav1.ObjectMeta, validName func(string) []string) field.ErrorList {
	var errs field.ErrorList
	path := field.NewPath("metadata")
	if meta.Name == "" {
		errs = append(errs, field.Required(path.Child("name"), ""))
	} else {
		for _, msg := range validName(meta.Name) {
			errs = append(errs, field.Invalid(path.Child("name"), meta.Name, msg))
		}
	}
	if meta.Namespace != "" {
		for _, msg := range validation.IsDNS1123Label(meta.Namespace) {
			errs = append(errs, field.Invalid(path.Child("namespace"), meta.Namespace, msg))
		}
	}
	return errs
}
