# A message with a oneof is an allOf of its parts. In JSON Schema additionalProperties beside allOf does not see the properties of the
# parts and would refuse all of them; unevaluatedProperties does.
.components.schemas |= map_values(if has("allOf") then del(.additionalProperties) + {unevaluatedProperties: false} else . end)
