{{- /* What things are called, and where clients and gateways find them. */ -}}

{{- define "mull.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "mull.labels" -}}
app.kubernetes.io/name: mull
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- /* (root, component): the labels that select its pods. */ -}}
{{- define "mull.selector" -}}
app.kubernetes.io/name: mull
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- /* What clients reach. */ -}}
{{- define "mull.front" -}}
{{- ternary "gateway" "engine" (eq .Values.mode "gateway") -}}
{{- end -}}

{{- /* Not empty if the release has engines: a gateway with upstreams of its own has none. */ -}}
{{- define "mull.engines" -}}
{{- if not .Values.settings.upstreams -}}yes{{- end -}}
{{- end -}}

{{- define "mull.router" -}}
{{- if and .Values.router.enabled (include "mull.engines" .) -}}yes{{- end -}}
{{- end -}}

{{- /* What starts a replica of the engine. */ -}}
{{- define "mull.engine.kind" -}}
{{- if eq (int .Values.engine.nodes) 1 -}}StatefulSet{{- else -}}{{ .Values.engine.multinode }}{{- end -}}
{{- end -}}

{{- define "mull.engine.most" -}}
{{- if .Values.autoscaling.kind -}}{{ .Values.engine.maxReplicas }}{{- else -}}{{ .Values.engine.replicas }}{{- end -}}
{{- end -}}

{{- /*
The engines' addresses, or the router's. Every replica that there may be is named: a gateway leaves alone what does not
answer and looks again. By one address for all of them it could not keep a search where its prefix is.
*/ -}}
{{- define "mull.upstreams" -}}
{{- $name := include "mull.name" . -}}
{{- if include "mull.router" . -}}
http://{{ $name }}-router:8000
{{- else if eq (include "mull.engine.kind" .) "RayCluster" -}}
http://{{ $name }}-engine:8000
{{- else -}}
{{- $urls := list -}}
{{- range $i := until (int (include "mull.engine.most" .)) -}}
{{- $urls = append $urls (printf "http://%s-engine-%d.%s-engine:8000" $name $i $name) -}}
{{- end -}}
{{- join "," $urls -}}
{{- end -}}
{{- end -}}
