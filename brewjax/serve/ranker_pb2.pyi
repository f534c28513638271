import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ScoreRequest(_message.Message):
    __slots__ = ("request_id", "member", "raw", "top_k", "truncation", "normalize_over")
    class Truncation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        TRUNCATION_UNSPECIFIED: _ClassVar[ScoreRequest.Truncation]
        REJECT: _ClassVar[ScoreRequest.Truncation]
        TRUNCATE: _ClassVar[ScoreRequest.Truncation]
    TRUNCATION_UNSPECIFIED: ScoreRequest.Truncation
    REJECT: ScoreRequest.Truncation
    TRUNCATE: ScoreRequest.Truncation
    class NormalizeOver(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        LABELS: _ClassVar[ScoreRequest.NormalizeOver]
        VOCABULARY: _ClassVar[ScoreRequest.NormalizeOver]
    LABELS: ScoreRequest.NormalizeOver
    VOCABULARY: ScoreRequest.NormalizeOver
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_FIELD_NUMBER: _ClassVar[int]
    NORMALIZE_OVER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    member: Member
    raw: Raw
    top_k: int
    truncation: ScoreRequest.Truncation
    normalize_over: ScoreRequest.NormalizeOver
    def __init__(self, request_id: _Optional[str] = ..., member: _Optional[_Union[Member, _Mapping]] = ..., raw: _Optional[_Union[Raw, _Mapping]] = ..., top_k: _Optional[int] = ..., truncation: _Optional[_Union[ScoreRequest.Truncation, str]] = ..., normalize_over: _Optional[_Union[ScoreRequest.NormalizeOver, str]] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("task", "now", "attributes", "history", "items", "steering_note", "id", "surface")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    TASK_FIELD_NUMBER: _ClassVar[int]
    NOW_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    STEERING_NOTE_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    SURFACE_FIELD_NUMBER: _ClassVar[int]
    task: str
    now: _timestamp_pb2.Timestamp
    attributes: _containers.MessageMap[str, Value]
    history: _containers.RepeatedCompositeFieldContainer[Event]
    items: _containers.RepeatedCompositeFieldContainer[Item]
    steering_note: str
    id: str
    surface: str
    def __init__(self, task: _Optional[str] = ..., now: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., attributes: _Optional[_Mapping[str, Value]] = ..., history: _Optional[_Iterable[_Union[Event, _Mapping]]] = ..., items: _Optional[_Iterable[_Union[Item, _Mapping]]] = ..., steering_note: _Optional[str] = ..., id: _Optional[str] = ..., surface: _Optional[str] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("action", "time", "attributes", "item")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    class ItemEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    ACTION_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    ITEM_FIELD_NUMBER: _ClassVar[int]
    action: str
    time: _timestamp_pb2.Timestamp
    attributes: _containers.MessageMap[str, Value]
    item: _containers.MessageMap[str, Value]
    def __init__(self, action: _Optional[str] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., attributes: _Optional[_Mapping[str, Value]] = ..., item: _Optional[_Mapping[str, Value]] = ...) -> None: ...

class Item(_message.Message):
    __slots__ = ("id", "attributes", "context")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    class ContextEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    id: str
    attributes: _containers.MessageMap[str, Value]
    context: _containers.MessageMap[str, Value]
    def __init__(self, id: _Optional[str] = ..., attributes: _Optional[_Mapping[str, Value]] = ..., context: _Optional[_Mapping[str, Value]] = ...) -> None: ...

class Value(_message.Message):
    __slots__ = ("text", "integer", "number", "list", "date", "truth")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LIST_FIELD_NUMBER: _ClassVar[int]
    DATE_FIELD_NUMBER: _ClassVar[int]
    TRUTH_FIELD_NUMBER: _ClassVar[int]
    text: str
    integer: int
    number: float
    list: Texts
    date: _timestamp_pb2.Timestamp
    truth: bool
    def __init__(self, text: _Optional[str] = ..., integer: _Optional[int] = ..., number: _Optional[float] = ..., list: _Optional[_Union[Texts, _Mapping]] = ..., date: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., truth: _Optional[bool] = ...) -> None: ...

class Texts(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, values: _Optional[_Iterable[str]] = ...) -> None: ...

class Raw(_message.Message):
    __slots__ = ("prefix", "events", "items", "labels", "label_tokens", "joint")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    LABEL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    JOINT_FIELD_NUMBER: _ClassVar[int]
    prefix: Text
    events: _containers.RepeatedCompositeFieldContainer[Text]
    items: _containers.RepeatedCompositeFieldContainer[Text]
    labels: _containers.RepeatedScalarFieldContainer[str]
    label_tokens: _containers.RepeatedScalarFieldContainer[int]
    joint: bool
    def __init__(self, prefix: _Optional[_Union[Text, _Mapping]] = ..., events: _Optional[_Iterable[_Union[Text, _Mapping]]] = ..., items: _Optional[_Iterable[_Union[Text, _Mapping]]] = ..., labels: _Optional[_Iterable[str]] = ..., label_tokens: _Optional[_Iterable[int]] = ..., joint: _Optional[bool] = ...) -> None: ...

class Text(_message.Message):
    __slots__ = ("text", "tokens")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    text: str
    tokens: Tokens
    def __init__(self, text: _Optional[str] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("request_id", "labels", "scores", "usage", "model")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    scores: _containers.RepeatedCompositeFieldContainer[ItemScore]
    usage: Usage
    model: str
    def __init__(self, request_id: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., scores: _Optional[_Iterable[_Union[ItemScore, _Mapping]]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., model: _Optional[str] = ...) -> None: ...

class ItemScore(_message.Message):
    __slots__ = ("index", "id", "probabilities")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    index: int
    id: str
    probabilities: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, index: _Optional[int] = ..., id: _Optional[str] = ..., probabilities: _Optional[_Iterable[float]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prefix_tokens", "cached_tokens", "item_tokens", "truncated_events", "truncated_tokens")
    PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ITEM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_EVENTS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prefix_tokens: int
    cached_tokens: int
    item_tokens: int
    truncated_events: int
    truncated_tokens: int
    def __init__(self, prefix_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., item_tokens: _Optional[int] = ..., truncated_events: _Optional[int] = ..., truncated_tokens: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("model", "parameters", "tasks", "limits", "shapes", "compilations")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SHAPES_FIELD_NUMBER: _ClassVar[int]
    COMPILATIONS_FIELD_NUMBER: _ClassVar[int]
    model: str
    parameters: int
    tasks: _containers.RepeatedCompositeFieldContainer[TaskDescription]
    limits: Limits
    shapes: _containers.RepeatedCompositeFieldContainer[Shape]
    compilations: int
    def __init__(self, model: _Optional[str] = ..., parameters: _Optional[int] = ..., tasks: _Optional[_Iterable[_Union[TaskDescription, _Mapping]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., shapes: _Optional[_Iterable[_Union[Shape, _Mapping]]] = ..., compilations: _Optional[int] = ...) -> None: ...

class TaskDescription(_message.Message):
    __slots__ = ("name", "instruction", "labels", "label_values", "history_actions", "member_attributes", "event_attributes", "item_attributes", "surface")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTION_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    LABEL_VALUES_FIELD_NUMBER: _ClassVar[int]
    HISTORY_ACTIONS_FIELD_NUMBER: _ClassVar[int]
    MEMBER_ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    EVENT_ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    ITEM_ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    SURFACE_FIELD_NUMBER: _ClassVar[int]
    name: str
    instruction: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    label_values: _containers.RepeatedScalarFieldContainer[float]
    history_actions: _containers.RepeatedScalarFieldContainer[str]
    member_attributes: _containers.RepeatedCompositeFieldContainer[AttributeDescription]
    event_attributes: _containers.RepeatedCompositeFieldContainer[AttributeDescription]
    item_attributes: _containers.RepeatedCompositeFieldContainer[AttributeDescription]
    surface: str
    def __init__(self, name: _Optional[str] = ..., instruction: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., label_values: _Optional[_Iterable[float]] = ..., history_actions: _Optional[_Iterable[str]] = ..., member_attributes: _Optional[_Iterable[_Union[AttributeDescription, _Mapping]]] = ..., event_attributes: _Optional[_Iterable[_Union[AttributeDescription, _Mapping]]] = ..., item_attributes: _Optional[_Iterable[_Union[AttributeDescription, _Mapping]]] = ..., surface: _Optional[str] = ...) -> None: ...

class AttributeDescription(_message.Message):
    __slots__ = ("column", "kind")
    COLUMN_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    column: str
    kind: str
    def __init__(self, column: _Optional[str] = ..., kind: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_candidates", "max_stream_candidates", "max_prefix_tokens", "max_candidate_tokens", "max_labels", "max_request_bytes", "max_queued_tokens", "max_concurrent_requests", "max_events")
    MAX_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    MAX_STREAM_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    MAX_PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_CANDIDATE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_LABELS_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONCURRENT_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_EVENTS_FIELD_NUMBER: _ClassVar[int]
    max_candidates: int
    max_stream_candidates: int
    max_prefix_tokens: int
    max_candidate_tokens: int
    max_labels: int
    max_request_bytes: int
    max_queued_tokens: int
    max_concurrent_requests: int
    max_events: int
    def __init__(self, max_candidates: _Optional[int] = ..., max_stream_candidates: _Optional[int] = ..., max_prefix_tokens: _Optional[int] = ..., max_candidate_tokens: _Optional[int] = ..., max_labels: _Optional[int] = ..., max_request_bytes: _Optional[int] = ..., max_queued_tokens: _Optional[int] = ..., max_concurrent_requests: _Optional[int] = ..., max_events: _Optional[int] = ...) -> None: ...

class Shape(_message.Message):
    __slots__ = ("tokens", "cached_tokens", "seconds")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    cached_tokens: int
    seconds: float
    def __init__(self, tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class ReloadRequest(_message.Message):
    __slots__ = ("folder", "encoder", "index")
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    folder: str
    encoder: str
    index: str
    def __init__(self, folder: _Optional[str] = ..., encoder: _Optional[str] = ..., index: _Optional[str] = ...) -> None: ...

class ReloadResponse(_message.Message):
    __slots__ = ("model", "encoder")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    model: str
    encoder: str
    def __init__(self, model: _Optional[str] = ..., encoder: _Optional[str] = ...) -> None: ...

class Row(_message.Message):
    __slots__ = ("id", "attributes")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    id: str
    attributes: _containers.MessageMap[str, Value]
    def __init__(self, id: _Optional[str] = ..., attributes: _Optional[_Mapping[str, Value]] = ...) -> None: ...

class RecordedEvent(_message.Message):
    __slots__ = ("member", "item", "action", "time", "attributes")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    ITEM_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    member: str
    item: str
    action: str
    time: _timestamp_pb2.Timestamp
    attributes: _containers.MessageMap[str, Value]
    def __init__(self, member: _Optional[str] = ..., item: _Optional[str] = ..., action: _Optional[str] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., attributes: _Optional[_Mapping[str, Value]] = ...) -> None: ...

class UpsertItemsRequest(_message.Message):
    __slots__ = ("request_id", "surface", "items")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SURFACE_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    surface: str
    items: _containers.RepeatedCompositeFieldContainer[Row]
    def __init__(self, request_id: _Optional[str] = ..., surface: _Optional[str] = ..., items: _Optional[_Iterable[_Union[Row, _Mapping]]] = ...) -> None: ...

class UpsertMembersRequest(_message.Message):
    __slots__ = ("request_id", "surface", "members")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SURFACE_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    surface: str
    members: _containers.RepeatedCompositeFieldContainer[Row]
    def __init__(self, request_id: _Optional[str] = ..., surface: _Optional[str] = ..., members: _Optional[_Iterable[_Union[Row, _Mapping]]] = ...) -> None: ...

class RecordEventsRequest(_message.Message):
    __slots__ = ("request_id", "surface", "events")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SURFACE_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    surface: str
    events: _containers.RepeatedCompositeFieldContainer[RecordedEvent]
    def __init__(self, request_id: _Optional[str] = ..., surface: _Optional[str] = ..., events: _Optional[_Iterable[_Union[RecordedEvent, _Mapping]]] = ...) -> None: ...

class ChangeResponse(_message.Message):
    __slots__ = ("request_id", "rows")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    rows: int
    def __init__(self, request_id: _Optional[str] = ..., rows: _Optional[int] = ...) -> None: ...

class Change(_message.Message):
    __slots__ = ("request_id", "surface", "items", "members", "events")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SURFACE_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    surface: str
    items: _containers.RepeatedCompositeFieldContainer[Row]
    members: _containers.RepeatedCompositeFieldContainer[Row]
    events: _containers.RepeatedCompositeFieldContainer[RecordedEvent]
    def __init__(self, request_id: _Optional[str] = ..., surface: _Optional[str] = ..., items: _Optional[_Iterable[_Union[Row, _Mapping]]] = ..., members: _Optional[_Iterable[_Union[Row, _Mapping]]] = ..., events: _Optional[_Iterable[_Union[RecordedEvent, _Mapping]]] = ...) -> None: ...
