#!/usr/bin/env bash
# Drains this spot node of Ray when its cloud takes it back: trainings write checkpoints and continue on other nodes.
#
#     spot.sh HEAD:6379    beside `ray start` on every spot node of AWS or Google Cloud
#     spot.sh --now 25     the notice is known, and 25 s are left: a hook of Kubernetes
#
# If several nodes run on one machine, the id of this node follows the address. The script needs wget, and the node's
# `python` and `ray` in PATH. It ends with 0 once the node is drained, and with 5 if Ray refuses until the end.
set -u
left='' hook='' told=''
if [ "${1-}" = --now ]; then
  left=${2-} hook=yes
  shift 2
fi
address=${1-${RAY_ADDRESS:-auto}} node=${2-}
if [[ ! $left =~ ^[0-9]*$ || $address == -* ]]; then
  echo 'usage: spot.sh [--now SECONDS] [HOST:PORT [NODE_ID]]' >&2
  exit 2
fi
url=${CARFT_RAY_METADATA_URL-http://169.254.169.254} # of both clouds
say() { echo "$(date '+%F %T') spot: $*"; }

ask() { # CLOUD, words for wget: sets answer to the headers and the text of an answer, or adds to faults
  answer=$(wget -q -S -O - --no-proxy --tries=1 --timeout=2 "${@:2}" 2>&1) && return
  faults+=" $1: $(grep -om 1 'HTTP/.*' <<< "$answer" || echo no answer)."
  return 1
}
ask_aws() { # sets left upon a notice: two minutes, or until its time if that is earlier
  ask aws --method=PUT --header='X-aws-ec2-metadata-token-ttl-seconds: 60' "$url/latest/api/token" || return
  if ! ask aws --header="X-aws-ec2-metadata-token: ${answer##*$'\n'}" "$url/latest/meta-data/spot/instance-action"; then
    faults=${faults% aws: * 404 *} # no notice
  elif [[ $answer =~ \"action\" ]]; then
    at=$(sed -n 's/.*"time": *"\([^"]*\)".*/\1/p' <<< "$answer")
    left=$(($(date -d "${at:-2 minutes}" +%s) - EPOCHSECONDS))
  fi
}
ask_gcp() { # half a minute
  ask gcp --header='Metadata-Flavor: Google' "$url/computeMetadata/v1/instance/preempted" || return
  [[ ${answer##*$'\n'} != TRUE ]] || left=30
}
drain() {
  local seconds=$((end - SECONDS - 5)) # the machine may be gone a little before its time
  timeout 30 ray drain-node --address "$address" --node-id "$node" --reason DRAIN_NODE_REASON_PREEMPTION \
    --reason-message 'this machine is about to end' --deadline-remaining-seconds $((seconds > 1 ? seconds : 1)) 2>&1
}

# Without an id, `ray drain-node` starts a Ray if it finds none. Ray's list of nodes needs the dashboard, which answers
# only on the head. So a driver joins for a moment.
own='import ray, sys; ray.init(sys.argv[1], log_to_driver=False); print(ray.get_runtime_context().get_node_id())'
until [ -n "$node" ] || node=$(python -c "$own" "$address" 2> >(tail -n 1 >&2)); do
  say "no node of Ray at $address here yet"
  sleep 2
done
[ -n "$left" ] || say "watching for a notice to node $node"
while [ -z "$left" ]; do
  faults='' && ask_aws
  [ -n "$left" ] || ask_gcp
  [ "$faults" = "$told" ] || say "metadata:${faults:- answers again}"
  told=$faults
  [ -n "$left" ] || sleep 2 # AWS asks for 5 s or less, and the notice of Google is short
done

end=$((SECONDS + left))
until error=$(drain); do
  say "cannot drain node $node: ${error##*$'\n'}"
  ((SECONDS + 1 < end)) || exit 5
  sleep 1
done
say "node $node is drained, $((end - SECONDS)) s before its end"
[ -z "$hook" ] || sleep $((end > SECONDS ? end - SECONDS : 0)) # holds the node up; an empty one ends sooner
