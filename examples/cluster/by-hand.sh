#!/bin/bash
# Ray on machines that are reached by ssh, a merge on it, and an end.
#
#   examples/cluster/by-hand.sh recipe.yaml merged FIRST OTHER...
#
# Runs on FIRST. Recipe, models and result are on a file system that all machines see; `$VENV`, the same on all
# of them, holds mergekit-monosoup[ray].
set -euo pipefail

recipe=${1:?name the recipe}
merged=${2:?name the folder of the result}
first=${3:?name this machine as the others see it}
shift 3
bin=${VENV:-$HOME/monosoup}/bin
port=${PORT:-6379}

export RAY_USAGE_STATS_ENABLED=0
# The others get the token over ssh, and keep it where Ray looks for it.
export RAY_AUTH_MODE=token
token=$("$bin/ray" get-auth-token --generate)

"$bin/ray" start --head --node-ip-address "$first" --port "$port"
end() {
	for other in "$@"; do
		ssh -n "$other" "$bin/ray stop" || true
	done
	"$bin/ray" stop
}
trap 'end "$@"' EXIT
for other in "$@"; do
	# shellcheck disable=SC2029 # what the others shall use is known here
	ssh "$other" "umask 077; mkdir -p ~/.ray; cat >~/.ray/auth_token; \
		RAY_AUTH_MODE=token $bin/ray start --address $first:$port" <<<"$token"
done

"$bin/mergekit-monosoup" merge "$recipe" "$merged" --ray "$first:$port" --resume
