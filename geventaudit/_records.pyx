# cython: language_level=3
"""Cheap records: calling a class of records, and replacing fields, without a call of Python code.

Type calls honour ``tp_vectorcall``, which is not inherited: a subclass is called as ever. What this constructor does not
take (wrong or missing arguments, keywords that are not interned) is left to the ``__init__`` of the dataclass.
"""

import dataclasses
import sys

from cpython.object cimport PyObject, PyTypeObject

cdef extern from *:
    """
    #ifndef Py_T_OBJECT_EX
    #include <structmember.h>
    #endif
    #define GA_SLOT(o, off) (*(PyObject **)((char *)(o) + (off)))
    #define GA_CLASSES 4
    #define GA_FIELDS 16
    typedef struct {
        PyTypeObject *type;
        Py_ssize_t count;
        PyObject *names[GA_FIELDS];
        Py_ssize_t offsets[GA_FIELDS];
        PyObject *defaults[GA_FIELDS];  /* a value, or the type whose empty object is made; NULL for none */
        int is_made[GA_FIELDS];
    } ga_class;
    static ga_class ga_classes[GA_CLASSES];

    static ga_class *ga_find(PyTypeObject *type) {
        for (int i = 0; i < GA_CLASSES; i++) if (ga_classes[i].type == type) return &ga_classes[i];
        return NULL;
    }

    static PyObject *ga_by_init(PyObject *type, PyObject *const *args, Py_ssize_t n, PyObject *kwnames) {
        Py_ssize_t k = kwnames ? PyTuple_GET_SIZE(kwnames) : 0, i;
        PyObject *result = NULL, *positional = PyTuple_New(n), *named = PyDict_New();
        if (positional && named) {
            for (i = 0; i < n; i++) PyTuple_SET_ITEM(positional, i, Py_NewRef(args[i]));
            for (i = 0; i < k; i++)
                if (PyDict_SetItem(named, PyTuple_GET_ITEM(kwnames, i), args[n + i]) < 0) goto done;
            result = PyType_Type.tp_call(type, positional, named);
        }
    done:
        Py_XDECREF(positional);
        Py_XDECREF(named);
        return result;
    }

    static PyObject *ga_make(PyObject *type, PyObject *const *args, size_t nargsf, PyObject *kwnames) {
        ga_class *c = ga_find((PyTypeObject *)type);
        Py_ssize_t n = PyVectorcall_NARGS(nargsf), k = kwnames ? PyTuple_GET_SIZE(kwnames) : 0, i, at, tried;
        PyObject *made;
        if (n + k > c->count) return ga_by_init(type, args, n, kwnames);
        made = c->type->tp_alloc(c->type, 0);
        if (!made) return NULL;
        for (i = 0; i < n; i++) GA_SLOT(made, c->offsets[i]) = Py_NewRef(args[i]);
        for (i = 0, at = n; i < k; i++, at++) {  /* keywords mostly come in the order of the fields */
            for (tried = 0; tried < c->count; tried++, at++) {
                if (at >= c->count) at = 0;
                if (c->names[at] == PyTuple_GET_ITEM(kwnames, i)) break;
            }
            if (tried == c->count || GA_SLOT(made, c->offsets[at])) goto by_init;
            GA_SLOT(made, c->offsets[at]) = Py_NewRef(args[n + i]);
        }
        for (i = n; n + k < c->count && i < c->count; i++) {
            PyObject *value = c->defaults[i];
            if (GA_SLOT(made, c->offsets[i])) continue;
            if (!value) goto by_init;
            value = c->is_made[i] ? PyObject_CallNoArgs(value) : Py_NewRef(value);
            if (!value) { Py_DECREF(made); return NULL; }
            GA_SLOT(made, c->offsets[i]) = value;
        }
        return made;
    by_init:
        Py_DECREF(made);
        return ga_by_init(type, args, n, kwnames);
    }

    static PyObject *ga_copy(PyObject *record) {  /* None: not by this */
        ga_class *c = ga_find(Py_TYPE(record));
        Py_ssize_t i = 0;
        while (c && i < c->count && GA_SLOT(record, c->offsets[i])) i++;
        if (!c || i < c->count) return Py_NewRef(Py_None);
        PyObject *made = c->type->tp_alloc(c->type, 0);
        for (i = 0; made && i < c->count; i++)
            GA_SLOT(made, c->offsets[i]) = Py_NewRef(GA_SLOT(record, c->offsets[i]));
        return made;
    }

    static int ga_set(PyObject *record, PyObject *name, PyObject *value) {  /* -1: no field of that name */
        ga_class *c = ga_find(Py_TYPE(record));
        for (Py_ssize_t i = 0; i < c->count; i++)
            if (c->names[i] == name) { Py_XSETREF(GA_SLOT(record, c->offsets[i]), Py_NewRef(value)); return 0; }
        return -1;
    }

    static Py_ssize_t ga_slot_offset(PyObject *d) { return ((PyMemberDescrObject *)d)->d_member->offset; }
    static void ga_set_call(PyTypeObject *type) { type->tp_vectorcall = ga_make; }
    static void ga_set_lookup(PyTypeObject *type) {
        type->tp_getattro = PyType_Type.tp_getattro;
        PyType_Modified(type);
    }
    """
    ctypedef struct ga_class:
        PyTypeObject* type
        Py_ssize_t count
        PyObject** names
        Py_ssize_t* offsets
        PyObject** defaults
        int* is_made
    ga_class* ga_classes
    Py_ssize_t GA_CLASSES
    Py_ssize_t GA_FIELDS
    object ga_copy(object record)
    int ga_set(object record, object name, object value)
    Py_ssize_t ga_slot_offset(object descriptor)
    void ga_set_call(PyTypeObject* type)
    void ga_set_lookup(PyTypeObject* type)

_alive = []  # the objects in the tables


def make_cheap(*classes):
    """Give each dataclass with slots a constructor in C. At most 4 classes, of at most 16 fields each."""
    cdef ga_class* c
    cdef Py_ssize_t i, number
    for number, cls in enumerate(classes):
        if number >= GA_CLASSES or len(dataclasses.fields(cls)) > GA_FIELDS:
            raise TypeError("there is no room for so many classes, or fields")
        c = &ga_classes[number]
        for i, field in enumerate(dataclasses.fields(cls)):
            name, default = sys.intern(field.name), field.default
            c.is_made[i] = default is dataclasses.MISSING
            if c.is_made[i]:
                default = field.default_factory
            c.names[i], c.offsets[i] = <PyObject*>name, ga_slot_offset(getattr(cls, field.name))
            if default is not dataclasses.MISSING:
                c.defaults[i] = <PyObject*>default
            _alive.append((name, default))
            c.count = i + 1
        _alive.append(cls)
        c.type = <PyTypeObject*>cls
        ga_set_call(c.type)


def replace(record, /, **changes):
    """Return a copy of a record with *changes*."""
    copy = ga_copy(record)
    if copy is None:
        return dataclasses.replace(record, **changes)
    for name, value in changes.items():
        if ga_set(copy, name, value) < 0:
            return dataclasses.replace(record, **changes)
    return copy


def make_lookups_cheap(metaclass, classes):
    """Make the members of enumerations plain attributes of their class: Python 3.11 finds them by ``__getattr__``."""
    for cls in classes:
        for name, member in cls.__members__.items():
            type.__setattr__(cls, name, member)
    ga_set_lookup(<PyTypeObject*>metaclass)
