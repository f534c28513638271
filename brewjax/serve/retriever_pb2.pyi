from brewjax.serve import ranker_pb2 as _ranker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Vector(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

class EmbedRequest(_message.Message):
    __slots__ = ("request_id", "inputs", "dimensions")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    inputs: _containers.RepeatedCompositeFieldContainer[Input]
    dimensions: int
    def __init__(self, request_id: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[Input, _Mapping]]] = ..., dimensions: _Optional[int] = ...) -> None: ...

class Input(_message.Message):
    __slots__ = ("member", "item", "text", "tokens")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    ITEM_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    member: _ranker_pb2.Member
    item: Attributes
    text: str
    tokens: _ranker_pb2.Tokens
    def __init__(self, member: _Optional[_Union[_ranker_pb2.Member, _Mapping]] = ..., item: _Optional[_Union[Attributes, _Mapping]] = ..., text: _Optional[str] = ..., tokens: _Optional[_Union[_ranker_pb2.Tokens, _Mapping]] = ...) -> None: ...

class Attributes(_message.Message):
    __slots__ = ("values",)
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _ranker_pb2.Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_ranker_pb2.Value, _Mapping]] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.MessageMap[str, _ranker_pb2.Value]
    def __init__(self, values: _Optional[_Mapping[str, _ranker_pb2.Value]] = ...) -> None: ...

class EmbedResponse(_message.Message):
    __slots__ = ("request_id", "vectors", "tokens", "model")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    vectors: _containers.RepeatedCompositeFieldContainer[Vector]
    tokens: int
    model: str
    def __init__(self, request_id: _Optional[str] = ..., vectors: _Optional[_Iterable[_Union[Vector, _Mapping]]] = ..., tokens: _Optional[int] = ..., model: _Optional[str] = ...) -> None: ...

class RetrieveRequest(_message.Message):
    __slots__ = ("request_id", "member", "vector", "text", "k", "required", "banned", "exclude")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_FIELD_NUMBER: _ClassVar[int]
    BANNED_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    member: _ranker_pb2.Member
    vector: Vector
    text: str
    k: int
    required: int
    banned: int
    exclude: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, request_id: _Optional[str] = ..., member: _Optional[_Union[_ranker_pb2.Member, _Mapping]] = ..., vector: _Optional[_Union[Vector, _Mapping]] = ..., text: _Optional[str] = ..., k: _Optional[int] = ..., required: _Optional[int] = ..., banned: _Optional[int] = ..., exclude: _Optional[_Iterable[str]] = ...) -> None: ...

class RetrieveResponse(_message.Message):
    __slots__ = ("request_id", "hits", "model")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    hits: _containers.RepeatedCompositeFieldContainer[Hit]
    model: str
    def __init__(self, request_id: _Optional[str] = ..., hits: _Optional[_Iterable[_Union[Hit, _Mapping]]] = ..., model: _Optional[str] = ...) -> None: ...

class Hit(_message.Message):
    __slots__ = ("id", "score")
    ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    id: str
    score: float
    def __init__(self, id: _Optional[str] = ..., score: _Optional[float] = ...) -> None: ...

class RetrieveAndScoreRequest(_message.Message):
    __slots__ = ("request_id", "member", "k", "top_k", "required", "banned", "exclude")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_FIELD_NUMBER: _ClassVar[int]
    BANNED_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    member: _ranker_pb2.Member
    k: int
    top_k: int
    required: int
    banned: int
    exclude: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, request_id: _Optional[str] = ..., member: _Optional[_Union[_ranker_pb2.Member, _Mapping]] = ..., k: _Optional[int] = ..., top_k: _Optional[int] = ..., required: _Optional[int] = ..., banned: _Optional[int] = ..., exclude: _Optional[_Iterable[str]] = ...) -> None: ...

class RetrieveAndScoreResponse(_message.Message):
    __slots__ = ("request_id", "labels", "hits", "encoder", "model")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    hits: _containers.RepeatedCompositeFieldContainer[RankedHit]
    encoder: str
    model: str
    def __init__(self, request_id: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., hits: _Optional[_Iterable[_Union[RankedHit, _Mapping]]] = ..., encoder: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class RankedHit(_message.Message):
    __slots__ = ("id", "probabilities", "similarity")
    ID_FIELD_NUMBER: _ClassVar[int]
    PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    id: str
    probabilities: _containers.RepeatedScalarFieldContainer[float]
    similarity: float
    def __init__(self, id: _Optional[str] = ..., probabilities: _Optional[_Iterable[float]] = ..., similarity: _Optional[float] = ...) -> None: ...

class UpsertRequest(_message.Message):
    __slots__ = ("request_id", "items")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    items: _containers.RepeatedCompositeFieldContainer[IndexedItem]
    def __init__(self, request_id: _Optional[str] = ..., items: _Optional[_Iterable[_Union[IndexedItem, _Mapping]]] = ...) -> None: ...

class IndexedItem(_message.Message):
    __slots__ = ("id", "item", "vector", "text", "bits")
    ID_FIELD_NUMBER: _ClassVar[int]
    ITEM_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    id: str
    item: Attributes
    vector: Vector
    text: str
    bits: int
    def __init__(self, id: _Optional[str] = ..., item: _Optional[_Union[Attributes, _Mapping]] = ..., vector: _Optional[_Union[Vector, _Mapping]] = ..., text: _Optional[str] = ..., bits: _Optional[int] = ...) -> None: ...

class UpsertResponse(_message.Message):
    __slots__ = ("request_id", "items", "model")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    items: int
    model: str
    def __init__(self, request_id: _Optional[str] = ..., items: _Optional[int] = ..., model: _Optional[str] = ...) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("request_id", "ids")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, request_id: _Optional[str] = ..., ids: _Optional[_Iterable[str]] = ...) -> None: ...

class DeleteResponse(_message.Message):
    __slots__ = ("request_id", "deleted")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    deleted: int
    def __init__(self, request_id: _Optional[str] = ..., deleted: _Optional[int] = ...) -> None: ...
