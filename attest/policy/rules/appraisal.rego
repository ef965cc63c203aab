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
package coffer.appraisal

decision := {"checks": [], "submods": {name: {"tier": tier(made), "checks": made} |
	some name, device in input.submods
	made := judge(device.kind, device.claims, device.checks)
}}

tier(made) := "contraindicated" if {
	some c in made
	c.outcome == "fail"
} else := "affirming"

judge("snp", claims, checks) := array.flatten([
	required("policy.snp.require", checks, data.policy.snp.require),
	one_of("policy.snp.product", claims, "snp.product", data.policy.snp.products),
	off("policy.snp.debug", claims, "snp.policy.debug", data.policy.snp.allowDebug, "start the guest without debugging"),
	off("policy.snp.migration", claims, "snp.policy.migration-agent", data.policy.snp.allowMigration, "start the guest without a migration agent"),
	vmpl(claims),
	minimum_tcb(claims),
	measurement(object.get(claims, "snp.measurement", "none"), object.get(data.policy.snp, "requireMeasurement", false)),
	[listed("policy.snp.id-key", object.get(claims, "snp.id-key-digest", "none"), list) | list := input.accepted.snp.idKeyDigests; list != null],
	[listed("policy.snp.chip-id", object.get(claims, "snp.chip-id", "none"), list) | list := input.accepted.snp.chipIds; list != null],
])

judge("tpm", claims, checks) := array.flatten([
	required("policy.tpm.require", checks, data.policy.tpm.require),
	one_of("policy.tpm.trust-class", claims, "tpm.trust-class", data.policy.tpm.classes),
	self_measured(claims),
	[listed(concat("", ["policy.tpm.pcr", index]), pcr(claims, index), list) | some index, list in input.accepted.tpm.pcrs],
	[unlisted(concat("", ["policy.tpm.pcr", index])) | some index in object.get(data.policy.tpm, "requirePCRs", []); not input.accepted.tpm.pcrs[index]],
])

judge("gpu", claims, checks) := array.flatten([
	required("policy.gpu.require", checks, data.policy.gpu.require),
	one_of("policy.gpu.feature-flag", claims, "gpu.feature-flag", input.accepted.gpu.featureFlags),
	listed("policy.gpu.driver-version", object.get(claims, "x-nvidia-gpu-driver-version", "none"), input.accepted.gpu.driverVersions),
	listed("policy.gpu.vbios-version", object.get(claims, "x-nvidia-gpu-vbios-version", "none"), input.accepted.gpu.vbiosVersions),
])

# A device that the document does not ask for is not judged.
judge("tpm", _, _) := [] if not data.policy.tpm

judge("gpu", _, _) := [] if not data.policy.gpu

# measurement is listed like other values, unless somebody must list some.
measurement(found, required) := unlisted("policy.snp.measurement") if {
	required == true
	input.accepted.snp.measurements == null
} else := listed("policy.snp.measurement", found, input.accepted.snp.measurements)

vmpl(claims) := {"id": "policy.snp.vmpl", "outcome": "pass", "found": $"{level}"} if {
	level := claims["snp.vmpl"]
	is_number(level)
	level >= 0
	level <= data.policy.snp.maxVMPL
} else := failed("policy.snp.vmpl", $"at most {data.policy.snp.maxVMPL}", $"{level}", "collect the report at a more privileged level") if {
	level := claims["snp.vmpl"]
	is_number(level)
} else := failed("policy.snp.vmpl", "a number", "no claim snp.vmpl", "")

minimum_tcb(claims) := skipped("policy.snp.minimum-tcb", "the policy sets no minimum for this product") if {
	not input.accepted.snp.minimumTCB[object.get(claims, "snp.product", "none")]
} else := {"id": "policy.snp.minimum-tcb", "outcome": "pass", "found": "no component below the minimum"} if {
	minimum := input.accepted.snp.minimumTCB[claims["snp.product"]]
	count(minimum) == count([name | some name, least in minimum; at_least(claims["snp.reported-tcb"][name], least)])
} else := failed("policy.snp.minimum-tcb", "no component below the minimum", concat(", ", low), "update the platform's firmware") if {
	tcb := claims["snp.reported-tcb"]
	low := [$"{name} {object.get(tcb, name, "none")} < {least}" |
		some name, least in input.accepted.snp.minimumTCB[claims["snp.product"]]
		not at_least(object.get(tcb, name, null), least)
	]
} else := failed("policy.snp.minimum-tcb", "a reported TCB", "none", "")

at_least(v, least) if {
	is_number(v)
	v >= least
}

self_measured(claims) := skipped("policy.tpm.self-measured", "the policy accepts what the agent measures of itself") if {
	# Accepting it does not make it evidence of anything.
	data.policy.tpm.allowSelfMeasured == true
	is_array(claims["tpm.measured-by"])
} else := {"id": "policy.tpm.self-measured", "outcome": "pass", "found": concat(", ", by)} if {
	by := claims["tpm.measured-by"]
	count(by) > 0
	every who in by {
		is_string(who)
		who != "self"
	}
} else := failed("policy.tpm.self-measured", "measurements by a measured boot", "the agent's own", "boot an image that measures the agent before it runs") if {
	"self" in claims["tpm.measured-by"]
} else := failed("policy.tpm.self-measured", "measurements by a measured boot", "none at all", "boot an image that measures the agent before it runs") if {
	claims["tpm.measured-by"] == []
} else := failed("policy.tpm.self-measured", "a word on who measured", "none", "")

pcr(claims, index) := claims["tpm.pcrs"][index] if {
	true
} else := "none"

# required turns checks that nobody made into failures.
required(id, checks, ids) := good if {
	good := [{"id": id, "outcome": "pass", "found": i} | some i in ids; checks[i].outcome == "pass"]
	count(good) == count(ids)
} else := [outcome(id, i, checks) | some i in ids]

outcome(id, i, checks) := {"id": id, "outcome": "pass", "found": i} if {
	checks[i].outcome == "pass"
} else := failed(id, $"{i} to be checked", $"not checked: {checks[i].found}", "give the verifier what the check needs") if {
	checks[i].outcome == "not checked"
} else := failed(id, $"{i} to pass", checks[i].outcome, "") if {
	checks[i]
} else := failed(id, $"{i} to be checked", "no such check was made", "give the verifier what the check needs")

# one_of requires a claim to be among values.
one_of(id, claims, claim, values) := {"id": id, "outcome": "pass", "found": claims[claim]} if {
	claims[claim] in values
} else := failed(id, concat(" or ", values), claims[claim], "name a policy that accepts it, if you do") if {
	is_string(claims[claim])
} else := failed(id, concat(" or ", values), $"no claim {claim}", "")

# listed requires a value to be among those that are accepted. Where nobody says
# which are, it was not checked.
listed(id, found, accepted) := skipped(id, concat(": ", [found, "the policy lists no reference values"])) if {
	accepted == null
} else := {"id": id, "outcome": "pass", "found": found} if {
	lower(found) in accepted
} else := failed(id, $"one of {count(accepted)} reference values", found, "run a version that the policy lists, or have it listed")

# unlisted is a value that somebody must list, and nobody does.
unlisted(id) := failed(id, "reference values that list it", "none", "give the verifier signed reference values, or name a policy that lists it")

# off requires a boolean claim to be there and, unless allowed, false.
off(id, claims, claim, allowed, hint) := {"id": id, "outcome": "pass", "found": "off"} if {
	claims[claim] == false
} else := skipped(id, "on, which the policy accepts") if {
	claims[claim] == true
	allowed == true
} else := failed(id, "off", "on", hint) if {
	claims[claim] == true
} else := failed(id, "off", $"no claim {claim}", "")

failed(id, expected, found, hint) := {"id": id, "outcome": "fail", "expected": expected, "found": found, "hint": hint}

skipped(id, why) := {"id": id, "outcome": "not checked", "found": why}
