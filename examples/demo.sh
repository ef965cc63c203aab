#!/bin/bash
# Runs one sealed training job and three attacks on a stack of its own, from
# nothing, and leaves nothing of that stack behind. make demo builds what it needs.
set -euo pipefail
cd "$(dirname "$0")/.."

dir=$(realpath -m "${COFFER_DIR:-/var/lib/coffer-demo}")
port_base=${COFFER_PORT_BASE:-27441}
bin=$PWD/build/bin tools=$PWD/build/tools images=$PWD/build/images
kept=$PWD/build/demo # what an auditor would be given; stays for you to look at
data=/usr/share/datasets/fashion-mnist
image=coffer.local/torch:latest
steps=8
unset COFFER_DIR

fail() {
	echo "demo: $*" >&2
	exit 1
}

[[ $EUID -eq 0 ]] || fail "needs root: it starts containerd, mounts and makes cgroups. Run: sudo make demo"
for need in "$bin/coffer" "$bin/coffer-verify" "$tools/ctr" "$images/torch.tar" build/host/images "$data"; do
	[[ -e $need ]] || fail "$need is missing: run it with make demo"
done
# Only a stack that this script made is ever purged.
if [[ -n $(ls -A "$dir" 2>/dev/null) && ! -e $dir/demo/made-by-demo ]]; then
	fail "$dir is not empty and not of an earlier demo: name another folder with COFFER_DIR, or remove it (coffer down --purge --dir $dir)"
fi

coffer() { "$bin/coffer" --dir "$dir" "$@"; }

secret=
finish() {
	local code=$?
	trap '' INT TERM
	trap - EXIT
	rm -rf "$secret"
	if [[ -e $dir ]]; then
		if [[ $code -ne 0 ]]; then
			echo
			echo "demo: stopping the stack"
		fi
		coffer down --purge >"$kept/down.log" 2>&1 || { cat "$kept/down.log" >&2; code=1; }
	fi
	if [[ $code -ne 0 ]]; then
		echo "demo: FAILED (exit code $code)" >&2
	fi
	exit "$code"
}
rm -rf "$kept"
mkdir -p "$kept"
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
secret=$(mktemp -d /dev/shm/coffer-demo.XXXXXX)

began=$EPOCHREALTIME step=0 step_began=$began
since() { awk -v a="$1" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f s", b - a }'; }
took() { [[ $step -eq 0 ]] || echo "      took $(since "$step_began")"; }
say() {
	took
	step=$((step + 1)) step_began=$EPOCHREALTIME
	printf '\n[%d/%d] %s\n' "$step" "$steps" "$1"
}
# Ctrl-C is for coffer: what it writes to must outlive it.
indent() { (trap "" INT; exec sed -u "s/^/      /"); }

# refused NAME STAGE CHECKS FILE CODE: an attack counts as refused only for the right reason.
refused() {
	[[ $5 -eq 3 ]] || fail "attack '$1' was not refused (exit code $5)"
	grep -q "refused at $2" "$4" || fail "attack '$1' was refused, but not at $2"
	local by
	by=$(grep -Exm1 "  ($3)" "$4") || fail "attack '$1' was refused, but not by $3"
	echo "      REFUSED at $2 by ${by#  }"
}

say "starting the stack in $dir: verifier, broker, node agent, software TPM, emulated SEV-SNP and H100"
if [[ -e $dir ]]; then
	coffer down --purge | indent # left by a demo that was killed
fi
mkdir -p "$dir"
coffer up --tools "$tools" --image "$images/torch.tar" --port-base "$port_base" --faults | indent
mkdir -p "$dir"/demo/fashion-mnist-checkpoints
touch "$dir/demo/made-by-demo"
go build -o "$kept/" ./examples/model ./examples/attacks

say "sealing the data set and secret initial weights, each under its own key, and granting them to one plan"
"$kept/model" -arch cnn -seed "$(od -An -N8 -tu8 /dev/urandom | tr -d ' ')" -out "$secret/model.safetensors"
coffer seal "$data" --asset fashion-mnist --kind dataset --out "$dir/demo/fashion-mnist" | indent
coffer seal "$secret/model.safetensors" --asset fashion-mnist-model --kind weights --out "$dir/demo/fashion-mnist-model" | indent
rm -rf "$secret"
coffer assets create fashion-mnist-checkpoints --kind checkpoints | indent
job=$dir/demo/job.yaml
sed "s#file:///var/lib/coffer/demo/#file://$dir/demo/#" examples/fashion-mnist/job.yaml >"$job"
plan=$(coffer plan "$job" | sed -n 1p)
echo "plan $plan" | indent
# Four releases, so that only what the attacks change can refuse them.
coffer grant create --plan "$plan" --asset fashion-mnist --asset fashion-mnist-model --asset fashion-mnist-checkpoints --allow-simulated --releases 4 | indent

say "running examples/fashion-mnist/job.yaml: the way of a job, then training under gVisor"
coffer submit "$job" --watch | tee -i "$kept/job.log" | indent
accuracy=$(grep -o '"accuracy": [0-9.]*' "$kept/job.log" | tail -1 | cut -d' ' -f2)
awk -v a="${accuracy:-0}" 'BEGIN { exit !(a > 0.80) }' || fail "accuracy ${accuracy:-unknown} is not above 0.80"
id=$(sed -n 's/^job \([0-9A-Z]*\) .*/\1/p' "$kept/job.log")
echo "accuracy $accuracy" | indent

say "verifying the job's bundle offline: a process of its own, without a network, whose root folder holds nothing but what follows"
auditor=$dir/demo/auditor
mkdir -p "$auditor"
coffer evidence get "$id" --as auditor -o "$auditor/bundle.json" | sed "s#$auditor/##" | indent
cp "$bin/coffer-verify" "$auditor/"
cp "$dir/verifier/jwks.json" "$auditor/verifier.jwks"
cp "$dir/broker/jwks.json" "$auditor/broker.jwks"
cp -r "$dir/simulation/roots" "$auditor/roots"
# The auditor's files are public; the demo's folder above them is not.
chmod -R a+rX "$auditor"
(cd "$auditor" && ls -1d ./* roots/*) | sed 's#^\./##' | paste -sd ' ' | fold -sw 110 | indent
cp -r "$auditor" "$kept/auditor"
env -i unshare --net --ipc --root="$auditor" --wd=/ --setgid=65534 --setuid=65534 \
	/coffer-verify --verifier-keys verifier.jwks --broker-keys broker.jwks --simulation-roots roots bundle.json >"$kept/verify.log" ||
	{ cat "$kept/verify.log"; fail "the bundle does not verify"; }
sed -n '/^What this bundle does not prove/,$p' "$kept/verify.log" | indent
grep -q '^VERIFIED' "$kept/verify.log" || fail "the bundle does not verify"

say "attack 1: the operator puts another image under the approved name; its program prints the weights"
sed 's#^main()$#print("weights:", open(MODEL, "rb").read().hex())\n&#' examples/fashion-mnist/train.py >"$kept/train.py"
if cmp -s examples/fashion-mnist/train.py "$kept/train.py"; then
	fail "the attack changes nothing: examples/fashion-mnist/train.py has changed its shape"
fi
build/host/images -cache "${COFFER_CACHE:?run it with make demo}" -out "$kept/changed" -add "$kept/train.py:/app/train.py" torch | indent
ctr() { "$tools/ctr" --address "/run/coffer/$(printf %s "$dir" | sha256sum | cut -c1-8)/containerd.sock" --namespace coffer "$@"; }
ctr images tag "$image" "$image-approved" >"$kept/ctr.log" 2>&1
ctr images import "$kept/changed/torch.tar" >>"$kept/ctr.log" 2>&1
rm -rf "$kept/changed"
code=0
coffer submit "$job" --watch >"$kept/attack-1.log" 2>&1 || code=$?
indent <"$kept/attack-1.log"
ctr images tag --force "$image-approved" "$image" >>"$kept/ctr.log" 2>&1
refused "changed image" admit "image\.signature" "$kept/attack-1.log" "$code"

say "attack 2: somebody with the node's own identity sends the verifier the first run's evidence again"
code=0
"$kept/attacks" --dir "$dir" "$auditor/bundle.json" >"$kept/attack-2.log" 2>&1 || code=$?
indent <"$kept/attack-2.log"
# A replay after the two minutes of a nonce is stale before it is a repetition.
refused "replayed evidence" verify "nonce\.unused|nonce\.fresh" "$kept/attack-2.log" "$code"

say "attack 3: somebody flips one bit of the GPU's report on its way"
coffer fault gpu-report --bit 12345 | indent
code=0
coffer submit "$job" --watch >"$kept/attack-3.log" 2>&1 || code=$?
indent <"$kept/attack-3.log"
refused "flipped bit" verify "gpu\.signature" "$kept/attack-3.log" "$code"

say "stopping the stack and removing its folder"
coffer down --purge | indent
[[ ! -e $dir ]] || fail "$dir is still there"
took

printf '\naccuracy %s, bundle verified offline, 3 of 3 attacks refused. Everything about the hardware was simulated.\n' "$accuracy"
printf 'The bundle and all that verifies it are in %s\ntotal %s\n' "${kept#"$PWD/"}/auditor" "$(since "$began")"
