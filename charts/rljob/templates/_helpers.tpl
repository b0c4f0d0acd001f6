{{- define "rljob.labels" -}}
app.kubernetes.io/name: rljob
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "rljob.operator" -}}
{{ .Release.Name }}-operator
{{- end }}

{{- define "rljob.nats" -}}
{{ .Release.Name }}-nats
{{- end }}

{{- define "rljob.natsUrl" -}}
{{- if .Values.nats.install -}}
nats://{{ include "rljob.nats" . }}.{{ .Release.Namespace }}.svc:4222
{{- else -}}
{{ required "nats.install is false: set nats.url to a server with JetStream" .Values.nats.url }}
{{- end -}}
{{- end }}

{{- define "rljob.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65534
runAsGroup: 65534
fsGroup: 65534
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "rljob.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}
