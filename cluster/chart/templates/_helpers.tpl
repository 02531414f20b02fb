{{/* KubeRay adds up to 16 characters to a RayJob's name, and a name of a pod has at most 63. */}}
{{- define "dagr.name" -}}
{{- if gt (len .Release.Name) 47 }}{{ fail (printf "the release's name %q has %d characters; KubeRay allows 47" .Release.Name (len .Release.Name)) }}{{ end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" .Release.Name) }}{{ fail (printf "the release's name %q must begin with a letter and have letters, digits and hyphens" .Release.Name) }}{{ end -}}
{{- .Release.Name -}}
{{- end -}}

{{- define "dagr.labels" -}}
app.kubernetes.io/name: dagr-ray
app.kubernetes.io/instance: {{ include "dagr.name" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{/* KubeRay puts app.kubernetes.io/name: kuberay on every team's Ray pods; this label is on this study's pods alone. */}}
{{- define "dagr.own" -}}
dagr-ray/study: {{ include "dagr.name" . }}
{{- end -}}

{{- define "dagr.serviceAccount" -}}
{{- default (include "dagr.name" .) .Values.serviceAccount.name -}}
{{- end -}}

{{- define "dagr.image" -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- end -}}

{{- define "dagr.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "dagr.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: ["ALL"]
{{- end -}}

{{/* The one place of the environment: of the head, of the workers, of the check before the study. */}}
{{- define "dagr.environment" -}}
# the JVM (Lucene) and Ray both claim SIGSEGV
- name: RAY_DISABLE_FAILURE_SIGNAL_HANDLER
  value: "1"
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
{{- with .Values.mlflow.trackingUri }}
- name: MLFLOW_TRACKING_URI
  value: {{ . | quote }}
{{- end }}
{{- if .Values.modelCache.claim }}
- name: HF_HOME
  value: /models
{{- end }}
{{- range $name, $value := .Values.environment }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end -}}

{{- define "dagr.environmentFrom" -}}
{{- range .Values.environmentSecrets }}
- secretRef:
    name: {{ . }}
{{- end }}
{{- end -}}

{{/* A pod's container. Of memory, request and limit are equal: Ray and Kubernetes must agree on when it is full. */}}
{{- define "dagr.container" -}}
{{- $root := .root -}}
- name: {{ .name }}
  image: {{ include "dagr.image" $root }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  workingDir: /app
  securityContext:
    {{- include "dagr.containerSecurity" $root | nindent 4 }}
  env:
    {{- include "dagr.environment" $root | nindent 4 }}
  {{- if $root.Values.environmentSecrets }}
  envFrom:
    {{- include "dagr.environmentFrom" $root | nindent 4 }}
  {{- end }}
  resources:
    {{- range $kind := list "requests" "limits" }}
    {{ $kind }}:
      cpu: {{ $.group.cpus | quote }}
      memory: {{ $.group.memory }}
      ephemeral-storage: {{ $.group.disk }}
      {{- if $.gpu }}
      {{ $.group.resource }}: "1"
      {{- end }}
    {{- end }}
  volumeMounts:
    - name: placement
      mountPath: /etc/dagr
      readOnly: true
    {{- if .gpu }}
    - name: shared-memory
      mountPath: /dev/shm
    {{- end }}
    {{- if $root.Values.modelCache.claim }}
    - name: models
      mountPath: /models
    {{- end }}
{{- end -}}

{{- define "dagr.pod" -}}
{{- $root := .root -}}
metadata:
  labels:
    {{- include "dagr.labels" $root | nindent 4 }}
    {{- include "dagr.own" $root | nindent 4 }}
  annotations:
    # a node that Karpenter or the cluster autoscaler takes away costs the shards at work on it
    karpenter.sh/do-not-disrupt: "true"
    cluster-autoscaler.kubernetes.io/safe-to-evict: "false"
spec:
  # a new pod is a new Ray node; a container that starts again in an old one is none
  restartPolicy: Never
  serviceAccountName: {{ include "dagr.serviceAccount" $root }}
  # the head's autoscaler alone talks to Kubernetes
  automountServiceAccountToken: {{ .token }}
  securityContext:
    {{- include "dagr.podSecurity" $root | nindent 4 }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with .group.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    {{- include "dagr.container" . | nindent 4 }}
  volumes:
    - name: placement
      configMap:
        name: {{ include "dagr.name" $root }}
    {{- if .gpu }}
    - name: shared-memory
      emptyDir:
        medium: Memory
        sizeLimit: {{ .group.sharedMemory }}
    {{- end }}
    {{- with $root.Values.modelCache.claim }}
    - name: models
      persistentVolumeClaim:
        claimName: {{ . }}
    {{- end }}
{{- end -}}

{{- define "dagr.words" -}}
{{ .Values.study.job }} {{ join " " .Values.study.arguments }} --runs {{ .Values.runs }} --placement /etc/dagr/placement.toml
{{- end -}}
