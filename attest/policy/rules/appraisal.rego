# What evidence is acceptable, after it was found genuine: each requirement of
# the document (data.policy), and the values that it and the signed reference
# values accept together (input.accepted), against the claims of each device
# (input.submods).
#
# A device on which these rules have nothing to say is refused. What must be
# there at all, simulation, and failed appraisals are not for rules to decide.
#
# Every pass states its condition, and what remains is a failure: an expression
# over a claim that is not there is undefined, and must end there.
#
# A check is one rule, with the pass first. There is one SEV-SNP report and one TPM
# quote, which rules name; GPUs are in any number, and are arguments. Rules that
# read nothing but the document and what is accepted are asked once, when the
# policy is loaded.
package coffer.appraisal

import data.policy
import input.accepted
import input.submods.cpu0.checks as snp_checks
import input.submods.cpu0.claims as snp
import input.submods.tpm0.checks as tpm_checks
import input.submods.tpm0.claims as tpm

decision := {"checks": [], "submods": {name: verdict(judge(device.kind, device)) | some name, device in input.submods}}

verdict(made) := {"tier": "contraindicated", "checks": made} if {
	made[_].outcome == "fail"
} else := {"tier": "affirming", "checks": made}

judge("snp", _) := array.flatten([
	snp_require, snp_product, snp_debug, snp_migration, snp_vmpl, snp_minimum_tcb, snp_measurement,
	[listed(o.id, object.get(snp, o.claim, "none"), o.values) | some o in snp_optional],
])

# A device that the document does not ask for is not judged.
judge("tpm", _) := array.flatten([
	tpm_require, tpm_trust_class, tpm_self_measured,
	[listed(concat("", ["policy.tpm.pcr", index]), pcr(index), list) | some index, list in accepted.tpm.pcrs],
	tpm_unlisted,
]) if {
	policy.tpm
} else := [] if not policy.tpm

judge("gpu", gpu) := array.flatten([
	gpu_require(gpu.checks),
	gpu_feature_flag(gpu.claims),
	listed("policy.gpu.driver-version", object.get(gpu.claims, "x-nvidia-gpu-driver-version", "none"), accepted.gpu.driverVersions),
	listed("policy.gpu.vbios-version", object.get(gpu.claims, "x-nvidia-gpu-vbios-version", "none"), accepted.gpu.vbiosVersions),
]) if {
	policy.gpu
} else := [] if not policy.gpu

# What the document requires to have been checked, and what is said if it was.
snp_required := required("policy.snp.require", policy.snp.require)

tpm_required := required("policy.tpm.require", policy.tpm.require)

gpu_required := required("policy.gpu.require", policy.gpu.require)

required(id, ids) := {
	"checks": {i: {"outcome": "pass"} | some i in ids},
	"passed": [{"id": id, "outcome": "pass", "found": i} | some i in ids],
}

snp_require := snp_required.passed if {
	object.subset(snp_checks, snp_required.checks)
} else := outcomes("policy.snp.require", policy.snp.require, snp_checks)

tpm_require := tpm_required.passed if {
	object.subset(tpm_checks, tpm_required.checks)
} else := outcomes("policy.tpm.require", policy.tpm.require, tpm_checks)

gpu_require(checks) := gpu_required.passed if {
	object.subset(checks, gpu_required.checks)
} else := outcomes("policy.gpu.require", policy.gpu.require, checks)

outcomes(id, ids, checks) := [outcome(id, i, checks) | some i in ids]

# outcome turns checks that nobody made into failures.
outcome(id, i, checks) := {"id": id, "outcome": "pass", "found": i} if {
	checks[i].outcome == "pass"
} else := failed(id, $"{i} to be checked", $"not checked: {checks[i].found}", "give the verifier what the check needs") if {
	checks[i].outcome == "not checked"
} else := failed(id, $"{i} to pass", checks[i].outcome, "") if {
	checks[i]
} else := failed(id, $"{i} to be checked", "no such check was made", "give the verifier what the check needs")

snp_product := snp_products[snp["snp.product"]] if {
	true
} else := other("policy.snp.product", snp, "snp.product", policy.snp.products)

snp_products := each("policy.snp.product", policy.snp.products)

snp_debug := {"id": "policy.snp.debug", "outcome": "pass", "found": "off"} if {
	snp["snp.policy.debug"] == false
} else := on("policy.snp.debug", snp, "snp.policy.debug", policy.snp.allowDebug, "start the guest without debugging")

snp_migration := {"id": "policy.snp.migration", "outcome": "pass", "found": "off"} if {
	snp["snp.policy.migration-agent"] == false
} else := on("policy.snp.migration", snp, "snp.policy.migration-agent", policy.snp.allowMigration, "start the guest without a migration agent")

snp_vmpl := snp_levels[snp["snp.vmpl"]] if {
	true
} else := failed("policy.snp.vmpl", $"at most {policy.snp.maxVMPL}", $"{level}", "collect the report at a more privileged level") if {
	level := snp["snp.vmpl"]
	is_number(level)
} else := failed("policy.snp.vmpl", "a number", "no claim snp.vmpl", "")

# The levels are 0 to 3 (AMD 56860, table 23).
snp_levels := {level: {"id": "policy.snp.vmpl", "outcome": "pass", "found": $"{level}"} | some level in [0, 1, 2, 3]; level <= policy.snp.maxVMPL}

snp_minimum_tcb := {"id": "policy.snp.minimum-tcb", "outcome": "not checked", "found": "the policy sets no minimum for this product"} if {
	not accepted.snp.minimumTCB[object.get(snp, "snp.product", "none")]
} else := {"id": "policy.snp.minimum-tcb", "outcome": "pass", "found": "no component below the minimum"} if {
	minimum := accepted.snp.minimumTCB[snp["snp.product"]]
	tcb := snp["snp.reported-tcb"]
	count(minimum) == count([name | some name, least in minimum; is_number(tcb[name]); tcb[name] >= least])
} else := failed("policy.snp.minimum-tcb", "no component below the minimum", concat(", ", low), "update the platform's firmware") if {
	tcb := snp["snp.reported-tcb"]
	low := [$"{name} {object.get(tcb, name, "none")} < {least}" |
		some name, least in accepted.snp.minimumTCB[snp["snp.product"]]
		not at_least(tcb, name, least)
	]
} else := failed("policy.snp.minimum-tcb", "a reported TCB", "none", "")

at_least(tcb, name, least) if {
	is_number(tcb[name])
	tcb[name] >= least
}

# The measurement is listed like other values, unless somebody must list some.
snp_measurement := unlisted("policy.snp.measurement") if {
	policy.snp.requireMeasurement == true
	accepted.snp.measurements == null
} else := listed("policy.snp.measurement", object.get(snp, "snp.measurement", "none"), accepted.snp.measurements)

# These are looked at where somebody lists values.
snp_optional := [o |
	some o in [
		{"id": "policy.snp.id-key", "claim": "snp.id-key-digest", "values": accepted.snp.idKeyDigests},
		{"id": "policy.snp.chip-id", "claim": "snp.chip-id", "values": accepted.snp.chipIds},
	]
	o.values != null
]

tpm_trust_class := tpm_classes[tpm["tpm.trust-class"]] if {
	true
} else := other("policy.tpm.trust-class", tpm, "tpm.trust-class", policy.tpm.classes)

tpm_classes := each("policy.tpm.trust-class", policy.tpm.classes)

tpm_self_measured := {"id": "policy.tpm.self-measured", "outcome": "not checked", "found": "the policy accepts what the agent measures of itself"} if {
	# Accepting it does not make it evidence of anything.
	policy.tpm.allowSelfMeasured == true
	is_array(tpm["tpm.measured-by"])
} else := {"id": "policy.tpm.self-measured", "outcome": "pass", "found": concat(", ", by)} if {
	by := tpm["tpm.measured-by"]
	count(by) > 0
	every who in by {
		is_string(who)
		who != "self"
	}
} else := {"id": "policy.tpm.self-measured", "outcome": "pass", "found": "by what the listed PCRs say was booted"} if {
	# The agent's word is that of the system that the firmware's log explains, and
	# reference values say which system that is.
	booted
	is_array(tpm["tpm.measured-by"])
	count(tpm["tpm.measured-by"]) > 0
} else := failed("policy.tpm.self-measured", "measurements by a measured boot", "the agent's own", "boot an image that measures the agent before it runs") if {
	"self" in tpm["tpm.measured-by"]
} else := failed("policy.tpm.self-measured", "measurements by a measured boot", "none at all", "boot an image that measures the agent before it runs") if {
	tpm["tpm.measured-by"] == []
} else := failed("policy.tpm.self-measured", "a word on who measured", "none", "")

# A PCR of which the document demands a value, and nobody lists one.
tpm_unlisted := [unlisted(concat("", ["policy.tpm.pcr", index])) |
	some index in object.get(policy.tpm, "requirePCRs", [])
	object.get(accepted.tpm.pcrs, index, null) == null
]

# booted is a measured boot: boot loader, its configuration, kernel, initrd, and what
# systemd-stub hands to a unified kernel, are all among values that the document
# demands and somebody lists (TCG PC Client Platform Firmware Profile, section
# 3.3.4; UAPI Linux TPM PCR Registry: 11 the unified kernel, 12 its command line and
# credentials, 13 the extensions of its initrd).
booted if {
	tpm_checks["tpm.tcg-log"].outcome == "pass"
	every index in ["4", "8", "9", "11", "12", "13"] {
		index in policy.tpm.requirePCRs
		lower(pcr(index)) in accepted.tpm.pcrs[index]
	}
}

pcr(index) := tpm["tpm.pcrs"][index] if {
	true
} else := "none"

gpu_feature_flag(claims) := gpu_feature_flags[claims["gpu.feature-flag"]] if {
	true
} else := other("policy.gpu.feature-flag", claims, "gpu.feature-flag", accepted.gpu.featureFlags)

gpu_feature_flags := each("policy.gpu.feature-flag", accepted.gpu.featureFlags)

# each is the check that passes with each of the values.
each(id, values) := {v: {"id": id, "outcome": "pass", "found": v} | some v in values}

# other is a claim that is not among values, or not there.
other(id, claims, claim, values) := failed(id, concat(" or ", values), claims[claim], "name a policy that accepts it, if you do") if {
	is_string(claims[claim])
} else := failed(id, concat(" or ", values), $"no claim {claim}", "")

# listed requires a value to be among those that are accepted. Where nobody says
# which are, it was not checked.
listed(id, found, list) := {"id": id, "outcome": "not checked", "found": concat(": ", [found, "the policy lists no reference values"])} if {
	list == null
} else := {"id": id, "outcome": "pass", "found": found} if {
	lower(found) in list
} else := failed(id, $"one of {count(list)} reference values", found, "run a version that the policy lists, or have it listed")

# unlisted is a value that somebody must list, and nobody does.
unlisted(id) := failed(id, "reference values that list it", "none", "give the verifier signed reference values, or name a policy that lists it")

# on is a boolean claim that is not off, which the document may allow.
on(id, claims, claim, allowed, hint) := {"id": id, "outcome": "not checked", "found": "on, which the policy accepts"} if {
	claims[claim] == true
	allowed == true
} else := failed(id, "off", "on", hint) if {
	claims[claim] == true
} else := failed(id, "off", $"no claim {claim}", "")

failed(id, expected, found, hint) := {"id": id, "outcome": "fail", "expected": expected, "found": found, "hint": hint}
