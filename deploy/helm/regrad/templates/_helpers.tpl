{{- define "regrad.labels" -}}
app.kubernetes.io/name: regrad
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "regrad.selector" -}}
app.kubernetes.io/name: regrad
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "regrad.bank" -}}
{{ .Release.Name }}-bank
{{- end }}

{{- define "regrad.server" -}}
{{ .Release.Name }}-server
{{- end }}

{{- define "regrad.scrape" -}}
prometheus.io/scrape: "true"
prometheus.io/port: {{ . | quote }}
{{- end }}

{{/* The images' user has the number 10001. Its group may read mounted secrets, and nobody else. */}}
{{- define "regrad.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "regrad.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end }}

{{/* A component's values for its pods, beside those for the container. */}}
{{- define "regrad.pod" -}}
{{- with .serviceAccountName }}
serviceAccountName: {{ . | quote }}
{{- end }}
{{- range $name := list "imagePullSecrets" "nodeSelector" "tolerations" }}
{{- with index $ $name }}
{{ $name }}: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{/* Nodes and servers of one kind spread over machines where they can. */}}
{{- define "regrad.spread" -}}
- maxSkew: 1
  topologyKey: kubernetes.io/hostname
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels: {{- include "regrad.selector" . | nindent 6 }}
{{- end }}
