{{- define "podgate.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "podgate.labels" -}}
app.kubernetes.io/name: podgate
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Values.image.tag | default .Chart.AppVersion | quote }}
{{- end }}

{{- define "podgate.selector" -}}
app.kubernetes.io/name: podgate
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Selectors of the two DaemonSets, which must not meet. */}}
{{- define "podgate.agent" -}}
{{ include "podgate.selector" . }}
app.kubernetes.io/component: agent
{{- end }}

{{- define "podgate.uninstall" -}}
{{ include "podgate.selector" . }}
app.kubernetes.io/component: uninstall
{{- end }}

{{/* What the pods of both DaemonSets have in common. */}}
{{- define "podgate.pod" -}}
hostNetwork: true
dnsPolicy: ClusterFirstWithHostNet
priorityClassName: {{ .Values.priorityClassName }}
securityContext:
  seccompProfile: { type: RuntimeDefault }
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 0 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 0 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
