"""Pieces of the chat templates that herd writes, in Jinja. `herd.chat.templates` puts them together. No torch.

`@NAME@` is a place that the composer fills. Every tag trims the white space around it, so a template reads the same with and
without `trim_blocks` and `lstrip_blocks`, which not every program that runs templates sets.
"""

from __future__ import annotations

__all__ = [
    "CALLS",
    "CHECK_NAME",
    "CODELLAMA_70B",
    "FIRST_USER",
    "GUARD",
    "HEADERS",
    "JSON_CALLS",
    "LINES",
    "LLAMA2",
    "NO_TOOLS",
    "PYTHON_CALLS",
    "TEXT_OF",
    "TOOLS",
    "WAITS",
]

TEXT_OF = """\
{%- macro text_of(content) -%}
    {%- if content is not defined or content is none -%}
    {%- elif content is string -%}
        {{- content -}}
    {%- elif content is mapping or content is not iterable -%}
        {{- raise_exception('content must be text or a list of parts') -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part is string -%}
                {{- part -}}
            {%- elif part is mapping and part['type'] == 'text' and part['text'] is string -%}
                {{- part['text'] -}}
            {%- else -%}
                {{- raise_exception('this prompt format takes text only, and a message holds something else') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
"""

# ---- system, user and assistant in strict alternation: Llama 2, Code Llama, the Guards ------------------------------

TURNS = (
    TEXT_OF
    + """\
{%- if tools -%}
    {{- raise_exception('this prompt format has no tools: use a Llama 3.1 or newer model, or leave the tools out') -}}
{%- endif -%}
{%- if not messages -%}
    {{- raise_exception('there are no messages to render: give at least one') -}}
{%- endif -%}
{%- set system = messages[0] if messages[0]['role'] in ['system', 'developer'] else none -%}
{%- set turns = messages[1:] if system is not none else messages -%}
{%- if not turns -%}
    {{- raise_exception('this prompt format needs a user message') -}}
{%- endif -%}
{%- for message in turns -%}
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('after an optional system message, user and assistant must alternate, the user first') -}}
    {%- endif -%}
    {%- if message['tool_calls'] -%}
        {{- raise_exception('a message calls tools, and this prompt format has none') -}}
    {%- endif -%}
{%- endfor -%}
"""
)

_USER_LAST = """\
{%- if add_generation_prompt and turns[-1]['role'] != 'user' -%}
    {{- raise_exception('the conversation ends with an assistant message: this prompt format answers a user message') -}}
{%- endif -%}
"""

LLAMA2 = (
    TURNS
    + _USER_LAST
    + """\
{%- for message in messages -%}
    {%- set content = text_of(message['content']) -%}
    {%- for tag in @TAGS@ -%}
        {%- if tag in content -%}
            {{- raise_exception('a message holds ' + tag + ', a tag of this prompt format: remove or reword it') -}}
        {%- endif -%}
    {%- endfor -%}
{%- endfor -%}
{%- for message in turns -%}
    {%- set content = text_of(message['content']) -%}
    {%- if loop.index0 == 0 and system is not none -%}
        {%- set content = '<<SYS>>\\n' + text_of(system['content']) + '\\n<</SYS>>\\n\\n' + content -%}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- bos_token + '[INST] ' + (content | trim) + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + (content | trim) + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
)

# A SentencePiece vocabulary puts a space in front of a text behind a special token. Meta's code encodes header and content
# apart, so the content brings a space of its own, which has to stand here.
CODELLAMA_70B = (
    TURNS
    + _USER_LAST
    + """\
{%- macro piece(content) -%}
    {%- if content | trim -%}
        {{- ' \\n\\n ' + (content | trim) -}}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token + ' Source: system' + piece(text_of(system['content']) if system is not none else '') + '<step>' -}}
{%- for message in turns -%}
    {{- ' Source: ' + message['role'] + piece(text_of(message['content'])) + '<step>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- ' Source: assistant\\nDestination: user \\n\\n ' -}}
{%- endif -%}
"""
)

GUARD = (
    TURNS
    + """\
{%- if system is not none -%}
    {{- raise_exception('a Guard judges user and assistant messages; leave the system message out') -}}
{%- endif -%}
{%- set agent = 'User' if turns[-1]['role'] == 'user' else 'Agent' -%}
{%- if categories is not defined or not categories -%}
    {%- set categories = @CATEGORIES@ -%}
{%- endif -%}
{%- set asked = namespace(lines=[]) -%}
{%- for code in categories -%}
    {%- if excluded_category_keys is not defined or not excluded_category_keys or code not in excluded_category_keys -%}
        {%- set asked.lines = asked.lines + [code + ': ' + categories[code]] -%}
    {%- endif -%}
{%- endfor -%}
{%- if not asked.lines -%}
    {{- raise_exception('no category is left to ask about: exclude fewer') -}}
{%- endif -%}
{{- bos_token + @OPEN@ -}}
{{- "Task: Check if there is unsafe content in '" + agent + "' messages in conversations according our safety policy " -}}
{{- 'with the below categories.\\n\\n<BEGIN UNSAFE CONTENT CATEGORIES>\\n' -}}
{{- asked.lines | join('\\n') -}}
{{- '\\n<END UNSAFE CONTENT CATEGORIES>\\n\\n<BEGIN CONVERSATION>\\n\\n' -}}
{%- for message in turns -%}
    {{- ('User: ' if message['role'] == 'user' else 'Agent: ') + (text_of(message['content']) | trim) + '\\n\\n' -}}
{%- endfor -%}
{{- '<END CONVERSATION>\\n\\nProvide your safety assessment for ' + @JUDGED@ + ' the above conversation:\\n' -}}
{{- "@DASH@ First line must read 'safe' or 'unsafe'.\\n" -}}
{{- '@DASH@ If unsafe, a second line must include a comma-separated list of violated categories.' -}}
{{- @CLOSE@ -}}
{%- if add_generation_prompt -%}
    {{- @REPLY@ -}}
{%- endif -%}
"""
)

# ---- messages behind role headers: Llama 3 and 4 -------------------------------------------------------------------

JSON_CALLS = """\
{%- macro write_call(name, arguments) -%}
    {%- if arguments is not defined or arguments is none or (arguments is string and not arguments | trim) -%}
        {%- set arguments = {} -%}
    {%- endif -%}
    {{- '{"name": ' + (name | tojson) + ', "parameters": ' -}}
    {{- (arguments if arguments is string else (arguments | tojson)) + '}' -}}
{%- endmacro -%}
{%- macro write_own_calls(calls) -%}
    {%- for call in calls -%}
        {%- set call = call['function'] if call['function'] is defined else call -%}
        {{- write_call(call['name'], call['arguments']) -}}
        {%- if not loop.last -%}
            {{- @JOINT@ -}}
        {%- endif -%}
    {%- endfor -%}
{%- endmacro -%}
"""

PYTHON_CALLS = """\
{%- macro python(value) -%}
    {%- if value is none -%}
        {{- 'None' -}}
    {%- elif value is string -%}
        {{- value | tojson -}}
    {%- elif value is mapping -%}
        {{- '{' -}}
        {%- for key in value -%}
            {{- python(key) + ': ' + python(value[key]) -}}
            {%- if not loop.last -%}
                {{- ', ' -}}
            {%- endif -%}
        {%- endfor -%}
        {{- '}' -}}
    {%- elif value is iterable -%}
        {{- '[' -}}
        {%- for item in value -%}
            {{- python(item) -}}
            {%- if not loop.last -%}
                {{- ', ' -}}
            {%- endif -%}
        {%- endfor -%}
        {{- ']' -}}
    {%- else -%}
        {{- value -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro write_call(name, arguments) -%}
    {%- if arguments is string and arguments | trim -%}
        {{- raise_exception('arguments of ' + name + ' are text: give them as an object') -}}
    {%- endif -%}
    {{- check_name(name) + name + '(' -}}
    {%- for key in (arguments or {}) -%}
        {{- check_name(key) + key + '=' + python(arguments[key]) -}}
        {%- if not loop.last -%}
            {{- ', ' -}}
        {%- endif -%}
    {%- endfor -%}
    {{- ')' -}}
{%- endmacro -%}
{%- macro write_own_calls(calls) -%}
    {{- '[' -}}
    {%- for call in calls -%}
        {%- set call = call['function'] if call['function'] is defined else call -%}
        {{- write_call(call['name'], call['arguments']) -}}
        {%- if not loop.last -%}
            {{- ', ' -}}
        {%- endif -%}
    {%- endfor -%}
    {{- ']' -}}
{%- endmacro -%}
"""

CHECK_NAME = """\
{%- macro check_name(name) -%}
    {%- for char in @PUNCTUATION@ -%}
        {%- if char in name -%}
            {{- raise_exception('the name ' + (name | tojson) + ' cannot be used: take letters, digits, _ - and .') -}}
        {%- endif -%}
    {%- endfor -%}
    {%- if not name -%}
        {{- raise_exception('a tool has no name') -}}
    {%- endif -%}
{%- endmacro -%}
"""

TOOLS = """\
{%- set known = @BUILTIN@ -%}
{%- set about = namespace(own=[], own_names=[], names=[], switched=[]) -%}
{%- for tool in (tools or []) -%}
    {%- set tool = tool['function'] if tool['function'] is defined else tool -%}
    {%- if tool['name'] is not string or tool['name'] | length > 64 or tool['name'] in about.names -%}
        {{- raise_exception('a tool needs a name of its own of 1 to 64 characters') -}}
    {%- endif -%}
    {{- check_name(tool['name']) -}}
    {%- set about.names = about.names + [tool['name']] -%}
    {%- set schema = tool['parameters'] or known.get(tool['name'], {'type': 'object', 'properties': {}}) -%}
    {%- if @SWITCHED@ and tool['name'] in known and (not tool['parameters'] or schema == known[tool['name']]) -%}
        {%- set about.switched = about.switched + [tool['name']] -%}
    {%- else -%}
        {%- set described = {'name': tool['name'], 'description': tool['description'] or '', 'parameters': @SCHEMA@} -%}
        {%- set about.own = about.own + [described] -%}
        {%- set about.own_names = about.own_names + [tool['name']] -%}
    {%- endif -%}
{%- endfor -%}
{%- if @SWITCHED@ and builtin_tools is defined and builtin_tools -%}
    {%- set about.switched = about.switched + (builtin_tools | list) -%}
{%- endif -%}
"""

NO_TOOLS = """\
{%- if tools -%}
    {{- raise_exception('Llama 3 was trained without tools: use a newer model, or leave the tools out') -}}
{%- endif -%}
"""

FIRST_USER = """\
{%- set speaker = namespace(first=-1) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' and speaker.first < 0 -%}
        {%- set speaker.first = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- if about.own and speaker.first < 0 -%}
    {{- raise_exception('tools are described beside the first user message, and there is none: add one') -}}
{%- endif -%}
{%- macro described_tools() -%}
    {{- @INTRODUCTION@ -}}
    {%- for tool in about.own -%}
        {{- ({'type': 'function', 'function': tool} | tojson(indent=4)) + '\\n\\n' -}}
    {%- endfor -%}
{%- endmacro -%}
"""

LINES = """\
{%- macro switch_lines() -%}
    {%- set listed = about.switched | reject('equalto', 'code_interpreter') | join(', ') -%}
    {{- 'Environment: ipython' -}}
    {%- if listed -%}
        {{- '\\nTools: ' + listed -}}
    {%- endif -%}
{%- endmacro -%}
"""

CALLS = """\
{%- macro is_builtin(call) -%}
    {%- set given = call['arguments'] if call['arguments'] is mapping else {} -%}
    {%- if @SWITCHED@ and call['name'] in known and call['name'] not in about.own_names -%}
        {%- if given | length == 1 and 'query' in given -%}
            {{- 'yes' -}}
        {%- endif -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro write_calls(calls) -%}
    {%- set seen = namespace(code=none, builtin=0) -%}
    {%- for call in calls -%}
        {%- set call = call['function'] if call['function'] is defined else call -%}
        {%- set given = call['arguments'] if call['arguments'] is mapping else {} -%}
        {%- if call['name'] == 'code_interpreter' and given | length == 1 and 'code' in given -%}
            {%- set seen.code = given['code'] | string -%}
        {%- elif is_builtin(call) -%}
            {%- set seen.builtin = seen.builtin + 1 -%}
        {%- endif -%}
    {%- endfor -%}
    {%- if seen.code is not none -%}
        {%- if calls | length > 1 -%}
            {{- raise_exception('a message that runs code holds no other call') -}}
        {%- endif -%}
        {{- @CODE@ -}}
    {%- elif seen.builtin and seen.builtin < calls | length -%}
        {{- raise_exception('built-in tools and other functions cannot be called in one message') -}}
    {%- elif seen.builtin -%}
        {{- '<|python_tag|>' -}}
        {%- for call in calls -%}
            {%- set call = call['function'] if call['function'] is defined else call -%}
            {{- call['name'] + '.call(query=' + (call['arguments']['query'] | tojson) + ')' -}}
            {%- if not loop.last -%}
                {{- '\\n' -}}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{- write_own_calls(calls) -}}
    {%- endif -%}
{%- endmacro -%}
"""

WAITS = """\
{%- macro waits(calls) -%}
    {%- if about.switched -%}
        {{- 'yes' -}}
    {%- endif -%}
    {%- for call in calls -%}
        {%- set call = call['function'] if call['function'] is defined else call -%}
        {%- if call['name'] == 'code_interpreter' or is_builtin(call) -%}
            {{- 'yes' -}}
        {%- endif -%}
    {%- endfor -%}
{%- endmacro -%}
"""

HEADERS = """\
{%- set roles = {'system': 'system', 'developer': 'system', 'user': 'user', 'assistant': 'assistant', 'tool': 'ipython',
                 'ipython': 'ipython', 'function': 'ipython'} -%}
{%- if not messages -%}
    {{- raise_exception('there are no messages to render: give at least one') -}}
{%- endif -%}
{{- bos_token -}}
{%- set opening = @OPENING@ -%}
{%- if opening and messages[0]['role'] not in ['system', 'developer'] -%}
    {{- '@START@system@END@\\n\\n' + opening + '@TURN@' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] not in roles -%}
        {{- raise_exception('a message has a role that is not system, user, assistant or tool') -}}
    {%- endif -%}
    {%- set role = roles[message['role']] -%}
    {%- set calls = message['tool_calls'] or [] -%}
    {%- if (calls or message['stop_reason']) and role != 'assistant' -%}
        {{- raise_exception('only assistant messages can carry tool calls and a stop reason') -}}
    {%- endif -%}
    {{- '@START@' + role + '@END@\\n\\n' -}}
    {%- set content = @CONTENT@ -%}
    {%- if loop.index0 == 0 and role == 'system' -%}
        {{- system_text(content) -}}
    {%- else -%}
        @PLACED@
        @BODY@
    {%- endif -%}
    {%- if message['stop_reason'] == 'end_of_message' or (not message['stop_reason'] and @WAITS@) -%}
        {{- '@MESSAGE@' -}}
    {%- else -%}
        {{- '@TURN@' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '@START@assistant@END@\\n\\n' -}}
{%- endif -%}
"""
