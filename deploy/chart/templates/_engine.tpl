{{- /* A pod of the engine, whatever starts it. */ -}}

{{- /* (root, further flags): a YAML list. Flags of the operator come last, and win. */ -}}
{{- define "mull.engine.flags" -}}
{{- $engine := (index . 0).Values.engine -}}
{{- $flags := list -}}
{{- with $engine.model }}{{ $flags = append $flags . }}{{ end -}}
{{- if gt (int $engine.gpus) 1 -}}
{{- $flags = concat $flags (list "--tensor-parallel-size" (toString $engine.gpus)) -}}
{{- end -}}
{{- if gt (int $engine.nodes) 1 -}}
{{- $flags = concat $flags (list "--pipeline-parallel-size" (toString $engine.nodes)) -}}
{{- end -}}
{{- if eq (index . 0).Values.mode "gateway" -}}
{{- $flags = append $flags "--enable-scale-out" -}}
{{- end -}}
{{- concat $flags (index . 1) $engine.args | toYaml -}}
{{- end -}}

{{- /* (root, component, command, arguments): its metadata and spec. */ -}}
{{- define "mull.engine.template" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $engine := $root.Values.engine -}}
metadata:
  labels:
    {{- include "mull.selector" (list $root $component) | nindent 4 }}
    {{- if eq $component "engine" }}
    mull/metrics: "yes"
    {{- end }}
  annotations: {{- include "mull.checksum" $root | nindent 4 }}
spec:
  {{- include "mull.pod" (list $root $engine.placement "") | nindent 2 }}
  terminationGracePeriodSeconds: 60 # 5 unannounced, 20 for what is under way, 30 for connections and the engine to end
  {{- include "mull.spread" (list $root $component) | nindent 2 }}
  containers:
    - name: engine
      image: {{ $engine.image }}
      command: {{- index . 2 | toYaml | nindent 8 }}
      args: {{- index . 3 | nindent 8 }}
      securityContext: {{- include "mull.locked" . | nindent 8 }}
      {{- include "mull.environment" (list $root "engine") | nindent 6 }}
      {{- include "mull.resources" (list $engine.resources $engine.gpus) | nindent 6 }}
      {{- if eq $component "engine" }}
      ports: [{name: http, containerPort: 8000}]
      {{- /* As patient as a start: a dead engine is replaced in place, and Mull itself gives up. */}}
      {{- include "mull.probes" (list "/health" (div $engine.startupSeconds 10)) | nindent 6 }}
      {{- end }}
      {{- $mounts := list (dict "name" "shm" "mountPath" "/dev/shm") }}
      {{- $volumes := list (dict "name" "shm" "emptyDir" (dict "medium" "Memory" "sizeLimit" $engine.sharedMemory)) }}
      {{- with $engine.cache }}
      {{- $mounts = append $mounts (dict "name" "cache" "mountPath" "/home/mull/.cache") }}
      {{- $volumes = append $volumes (dict "name" "cache" "persistentVolumeClaim" (dict "claimName" .)) }}
      {{- end }}
      {{- include "mull.mounts" (list $root $mounts) | nindent 6 }}
  {{- include "mull.volumes" (list $root $volumes) | nindent 2 }}
{{- end -}}
