# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, infer_types=False
"""The canonical form of a record that a JSON parser has read, written in one walk over it.

The walk only says "these are the bytes" or "not sure": :func:`~geventaudit.trail.canonical.canonical_bytes` decides on
the rest, and says the reasons. A parser's values are of the exact types of JSON, and nothing else holds them.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from libc.string cimport memcpy

from ..records import CallerIdentityType
from ..schema.json_safe import MAX_SAFE_INTEGER
from ..trail.canonical import BODY_KEYS

__all__ = ["canonical_or_none"]

cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* size) except NULL
    int PyUnicode_Compare(object one, object other) except? -1
    long long PyLong_AsLongLongAndOverflow(object number, int* overflow) except? -1

cdef enum:
    MAX_DEPTH = 100

cdef struct Buffer:
    char* data
    Py_ssize_t size
    Py_ssize_t room

cdef class NotSure(Exception):
    """The body has a value that is for the code in Python."""

cdef tuple KEYS = BODY_KEYS
cdef frozenset SORTED_KEYS = frozenset({"CustomData", "TargetResources"})
cdef frozenset KINDS = frozenset([kind.value for kind in CallerIdentityType])
cdef tuple IDENTITY_KEYS = ("Identity", "Description")
cdef long long MAX_SAFE = MAX_SAFE_INTEGER


cdef int put(Buffer* out, const char* data, Py_ssize_t size) except -1:
    cdef Py_ssize_t room
    cdef char* larger
    if out.size + size > out.room:
        room = (out.size + size) * 2 + 1024
        larger = <char*>PyMem_Realloc(out.data, room)
        if larger is NULL:
            raise MemoryError
        out.data, out.room = larger, room
    memcpy(out.data + out.size, data, size)
    out.size += size
    return 0


cdef int put_number(Buffer* out, int code, unsigned long long value, int size) except -1:
    """Write a code and a big-endian number of so many bytes."""
    cdef unsigned char data[9]
    cdef int place
    data[0] = <unsigned char>code
    for place in range(size):
        data[size - place] = <unsigned char>(value >> (8 * place))
    return put(out, <const char*>data, size + 1)


cdef int put_header(Buffer* out, Py_ssize_t size, int few, int most, int byte, int word) except -1:
    """Write the shortest header of a text, an array or a map. Only texts have one with a byte for the size."""
    if size < most:
        return put_number(out, few | <int>size, 0, 0)
    if byte and size < 0x100:
        return put_number(out, byte, size, 1)
    if size < 0x10000:
        return put_number(out, word, size, 2)
    return put_number(out, word + 1, size, 4)


cdef int put_text(Buffer* out, object text) except -1:
    cdef Py_ssize_t size
    cdef const char* data = PyUnicode_AsUTF8AndSize(text, &size)
    put_header(out, size, 0xA0, 32, 0xD9, 0xDA)
    return put(out, data, size)


cdef int put_integer(Buffer* out, object number) except -1:
    cdef int overflow = 0
    cdef long long value = PyLong_AsLongLongAndOverflow(number, &overflow)
    if overflow or value > MAX_SAFE or value < -MAX_SAFE:
        raise NotSure
    if -32 <= value < 128:
        return put_number(out, <int>(value & 0xFF), 0, 0)
    if value >= 0:
        if value < 0x100:
            return put_number(out, 0xCC, value, 1)
        if value < 0x10000:
            return put_number(out, 0xCD, value, 2)
        if value < 0x100000000:
            return put_number(out, 0xCE, value, 4)
        return put_number(out, 0xCF, value, 8)
    if value >= -0x80:
        return put_number(out, 0xD0, <unsigned long long>value, 1)
    if value >= -0x8000:
        return put_number(out, 0xD1, <unsigned long long>value, 2)
    if value >= -0x80000000LL:
        return put_number(out, 0xD2, <unsigned long long>value, 4)
    return put_number(out, 0xD3, <unsigned long long>value, 8)


cdef bint is_sorted(dict values) except -1:
    cdef object before = None
    for key in values:
        if before is not None and PyUnicode_Compare(before, key) >= 0:
            return False
        before = key
    return True


cdef int put_map(Buffer* out, dict values, int depth) except -1:
    """Write a map, sorted by code point."""
    put_header(out, len(values), 0x80, 16, 0, 0xDE)
    if is_sorted(values):
        for key, each in values.items():
            put_text(out, key)
            put_value(out, each, depth)
    else:
        for key in sorted(values):
            put_text(out, key)
            put_value(out, values[key], depth)
    return 0


cdef int put_value(Buffer* out, object value, int depth) except -1:
    cdef type kind = type(value)
    if kind is str:
        return put_text(out, value)
    if kind is dict or kind is list:
        if depth == 0:
            raise NotSure
        if kind is dict:
            return put_map(out, <dict>value, depth - 1)
        put_header(out, len(<list>value), 0x90, 16, 0, 0xDC)
        for each in <list>value:
            put_value(out, each, depth - 1)
        return 0
    if kind is int:
        return put_integer(out, value)
    if value is None:
        return put_number(out, 0xC0, 0, 0)
    if kind is bool:
        return put_number(out, 0xC3 if value else 0xC2, 0, 0)
    raise NotSure


cdef int put_identities(Buffer* out, dict groups) except -1:
    """Write the identities of callers, of one kind. The code in Python knows the order of the kinds."""
    cdef dict identity
    if len(groups) != 1:
        raise NotSure
    put_header(out, 1, 0x80, 16, 0, 0xDE)
    for kind, group in groups.items():
        if type(kind) is not str or type(group) is not list or kind not in KINDS:
            raise NotSure
        put_text(out, kind)
        put_header(out, len(<list>group), 0x90, 16, 0, 0xDC)
        for each in <list>group:
            if type(each) is not dict or len(<dict>each) != 2:
                raise NotSure
            identity = <dict>each
            put_header(out, 2, 0x80, 16, 0, 0xDE)
            for name in IDENTITY_KEYS:
                value = identity.get(name)
                if type(value) is not str:
                    raise NotSure
                put_text(out, name)
                put_text(out, value)
    return 0


cdef int put_body(Buffer* out, dict body) except -1:
    cdef int there = 0
    for key in KEYS:
        there += key in body
    put_header(out, there, 0x80, 16, 0, 0xDE)
    for key in KEYS:
        if key not in body:
            continue
        value = body[key]
        put_text(out, key)
        if type(value) is not dict:
            if key == "CallerIdentities":
                raise NotSure
            put_value(out, value, 1)
        elif key in SORTED_KEYS:
            put_map(out, <dict>value, MAX_DEPTH)
        elif key == "CallerIdentities":
            put_identities(out, <dict>value)
        else:
            raise NotSure
    return 0


def canonical_or_none(body):
    cdef Buffer out
    if type(body) is not dict:
        return None
    out.data, out.size, out.room = NULL, 0, 0
    try:
        put_body(&out, <dict>body)
        return PyBytes_FromStringAndSize(out.data, out.size)
    except (NotSure, UnicodeEncodeError):
        return None
    finally:
        PyMem_Free(out.data)
