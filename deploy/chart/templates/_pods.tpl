{{- /* What pods have in common: how they are locked up, what they read, where they may write. */ -}}

{{- define "mull.locked" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- /* (root, placement, service account or "") */ -}}
{{- define "mull.pod" -}}
{{- $root := index . 0 -}}
{{- with index . 2 }}
serviceAccountName: {{ . }}
{{- end }}
automountServiceAccountToken: {{ ne (index . 2) "" }}
enableServiceLinks: false # or a Service called "mull" would set MULL_PORT
securityContext:
  runAsNonRoot: true
  runAsUser: 2000 # the user `vllm` of vLLM's own image, `mull` of the others
  runAsGroup: 2000
  fsGroup: 2000
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with index . 1 }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* Not empty if there is a secret with variables. */ -}}
{{- define "mull.secret" -}}
{{- with .Values.secrets -}}
{{- if .existing -}}{{ .existing }}{{- else if or .settings .environment -}}{{ include "mull.name" $ }}{{- end -}}
{{- end -}}
{{- end -}}

{{- /* A number as Helm holds it, a float, would print as 1.07e+09. */ -}}
{{- define "mull.text" -}}
{{- if kindIs "string" . }}{{ . }}{{ else if kindIs "slice" . }}{{ join "," . }}{{ else }}{{ toJson . }}{{ end -}}
{{- end -}}

{{- /* (root, component): the variables of a pod; Mull's own settings only where Mull runs. */ -}}
{{- define "mull.environment" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $values := $root.Values -}}
{{- $settings := dict -}}
{{- if $values.adapters.enabled -}}
{{- $settings = dict "adapters" "/srv/mull/adapters" "adapter_imports" "/srv/mull/trained" -}}
{{- end -}}
{{- if eq $component "gateway" -}}
{{- $_ := set $settings "upstreams" (include "mull.upstreams" $root) -}}
{{- end -}}
{{- $settings = merge (deepCopy $values.settings) $settings -}}
env:
  - {name: HOME, value: /home/mull}
  {{- if not (and (eq $component "engine") (eq $values.engine.server "vllm")) }}
  {{- range $name, $value := $settings }}
  - {name: MULL_{{ upper $name }}, value: {{ include "mull.text" $value | quote }}}
  {{- end }}
  {{- if $values.config }}
  - {name: MULL_CONFIG, value: /etc/mull/mull.yaml}
  {{- end }}
  {{- end }}
  {{- range $name, $value := $values.environment }}
  - {name: {{ $name }}, value: {{ $value | quote }}}
  {{- end }}
{{- with include "mull.secret" $root }}
envFrom:
  - secretRef: {name: {{ . }}}
{{- end }}
{{- end -}}

{{- /* (root, further mounts) */ -}}
{{- define "mull.mounts" -}}
{{- $values := (index . 0).Values -}}
volumeMounts:
  - {name: home, mountPath: /home/mull}
  - {name: tmp, mountPath: /tmp}
  {{- if $values.config }}
  - {name: config, mountPath: /etc/mull, readOnly: true}
  {{- end }}
  {{- if $values.adapters.enabled }}
  - {name: adapters, mountPath: /srv/mull}
  {{- end }}
  {{- with concat (index . 1) $values.volumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- /* (root, further volumes) */ -}}
{{- define "mull.volumes" -}}
{{- $root := index . 0 -}}
{{- $values := $root.Values -}}
volumes:
  - {name: home, emptyDir: {}}
  - {name: tmp, emptyDir: {}}
  {{- if $values.config }}
  - {name: config, secret: {secretName: {{ include "mull.name" $root }}-config}}
  {{- end }}
  {{- if $values.adapters.enabled }}
  - name: adapters
    persistentVolumeClaim: {claimName: {{ $values.adapters.claim | default (printf "%s-adapters" (include "mull.name" $root)) }}}
  {{- end }}
  {{- with concat (index . 1) $values.volumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- /* Another configuration is another pod: neither variables nor Mull are told of a change. */ -}}
{{- define "mull.checksum" -}}
mull/configuration: {{ list .Values.config .Values.secrets | toJson | sha256sum }}
{{- end -}}

{{- /* (requests and limits, GPUs) */ -}}
{{- define "mull.resources" -}}
{{- $gpus := index . 1 | int -}}
{{- $resources := deepCopy (index . 0) -}}
{{- if $gpus -}}
{{- $resources = merge $resources (dict "limits" (dict "nvidia.com/gpu" $gpus)) -}}
{{- end -}}
resources: {{- toYaml $resources | nindent 2 }}
{{- end -}}

{{- /*
(path of liveness, failures until a start is given up): `/health` says whether requests can be answered now, and is what
makes a pod ready.
*/ -}}
{{- define "mull.probes" -}}
startupProbe:
  httpGet: {path: {{ index . 0 }}, port: http}
  periodSeconds: 10
  timeoutSeconds: 15
  failureThreshold: {{ index . 1 }}
livenessProbe:
  httpGet: {path: {{ index . 0 }}, port: http}
  periodSeconds: 10
  timeoutSeconds: 15
  failureThreshold: {{ index . 1 }}
readinessProbe:
  httpGet: {path: /health, port: http}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
lifecycle:
  preStop: {sleep: {seconds: 5}} # until nobody sends here any more
{{- end -}}

{{- /* (root, component): keep replicas on different nodes where that can be done. */ -}}
{{- define "mull.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "mull.selector" . | nindent 8 }}
{{- end -}}
